"""Covered faces and drawings among photos: how many are found, and how many clean photos are lost. Covers and drawings are made here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.faces.clarity import ClarityReader
from models.faces.train_clarity import MIN_COVER, cover, draw, unrecognisable

TRIES = 3            # covers tried on each photo; those that hide less than MIN_COVER of the face are not counted


def spoil_and_read(crops_NSSC: NDArray[np.uint8], reader: ClarityReader, *, seed: int = 3) -> dict[str, Any]:
    """Aligned crops of clean photos, as they are and spoilt: shares that are refused."""
    rng = np.random.default_rng(seed)
    limits = reader.limits
    clean = [reader.read(c) for c in crops_NSSC]
    covered = [made for c in crops_NSSC for made, hidden in (cover(c, np.ascontiguousarray(np.roll(c[::-1], c.shape[0] // 5, 1)), rng) for _ in range(TRIES))
               if hidden >= MIN_COVER]
    found = {"covered": [reader.read(c).covered > limits.covered for c in covered],
             "unrecognisable": [reader.read(unrecognisable(c, rng)).covered > limits.covered for c in crops_NSSC],
             "drawn": [reader.read(draw(c, rng)).drawn > limits.drawn for c in crops_NSSC]}
    return {"photos": len(clean), "clean_called_covered": sum(c.covered > limits.covered for c in clean),
            "clean_called_drawn": sum(c.drawn > limits.drawn for c in clean), "found": {k: float(np.mean(v)) for k, v in found.items()},
            "made": {k: len(v) for k, v in found.items()}}
