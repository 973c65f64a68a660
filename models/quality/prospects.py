"""What a base can keep of a person, measured before any training: their photos through the base's own autoencoder and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from likeness.acceptance import Estimate, Fit, Prospect, Trials
from likeness.digest import Digest, of_json
from likeness.settings import Settings
from models.diffusion.bases import Base
from models.faces import align
from models.faces.photos import AcceptedPhoto
from models.faces.tools import FaceTools

FILE = Path(__file__).with_name("acceptance.json")
LOOKED_AT = 12          # photos at most: more hardly move a median, and each costs as much as judging it


def prospect_of(base: Base, photos: Sequence[AcceptedPhoto], faces: FaceTools) -> Prospect | None:
    """What is known of a set before training; None if it is too small to say how far a photo is from the others, or no face survives.

    Each of at most LOOKED_AT photos goes through the autoencoder once and is found and recognised once more.
    """
    looked_at = photos[:: max(1, -(-len(photos) // LOOKED_AT))]
    crops = [align.crop(p.pixels, align.fit(p.face.points), side_px=base.ref.resolution_px) for p in looked_at]
    if len(crops) < 2:
        return None
    found = kept(base, np.stack(crops), np.stack([p.embedding for p in looked_at]), faces)
    return None if found is None else Prospect(photos=len(photos), kept=found)


@torch.no_grad()
def kept(base: Base, crops_NSSC: NDArray[np.uint8], vectors_ND: NDArray[np.float32], faces: FaceTools) -> float | None:
    """Median distance of N portraits, encoded and decoded by the base's autoencoder, to the centroid of the other portraits' own vectors.

    Args:
        crops_NSSC: aligned tight crops at the base's resolution, uint8 RGB.
        vectors_ND: the recogniser's vectors of the photos they were cut from.

    Returns:
        The distance, in the recogniser's own units; None if a face is found in none of the decoded portraits.
    """
    latents = base.encode_images(torch.from_numpy(crops_NSSC)).to(base.device, base.dtype)
    decoded = torch.cat([base.pipe.vae.decode(part / float(base.pipe.vae.config.scaling_factor)).sample.float().cpu() for part in latents.split(8)])
    pictures = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    distances = []
    for i, picture in enumerate(pictures):
        face = faces.main_face(picture)
        if face is not None:
            others = np.delete(vectors_ND, i, axis=0).mean(0)
            distances.append(float(np.linalg.norm(faces.embed_faces(picture, [face])[0] - others)))
    return float(np.median(distances)) if distances else None


def drawn_by(settings: Settings) -> Digest:
    """Digest of what decides which samples are judged: the battery and how it is drawn."""
    return of_json([settings.battery.digest, settings.sampling.digest])


def trials_for(settings: Settings, backend: str) -> Trials | None:
    """What was measured over a base of this name with exactly this recipe, policy, battery, sampling and recogniser; None if nobody did. Its revision is for the caller
    to compare.
    """
    wanted = (settings.base, settings.recipe.digest, settings.gate.digest, drawn_by(settings), backend)
    return next((t for t in shipped() if (t.base, t.recipe, t.policy, t.drawn, t.backend) == wanted), None)


def estimate(trials: Trials, prospect: Prospect) -> Estimate:
    """How likely this set is accepted."""
    return Fit(trials.rows).estimate(prospect, date=trials.date)


@cache
def shipped() -> tuple[Trials, ...]:
    """Everything that was measured."""
    return TypeAdapter(tuple[Trials, ...]).validate_json(FILE.read_bytes())
