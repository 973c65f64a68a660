"""Pictures of a class, drawn by a base itself: what prior preservation trains on beside the portraits. They hold nobody's photos, and are the same for every subject.

Shapes: M pictures, S pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from likeness import digest
from likeness.records import BaseRef
from models.diffusion.bases import Base
from models.diffusion.sampler import sample

STEPS, BATCH = 20, 4          # of their drawing, whatever the settings say of samples: a training's key knows base and noun, not these
COUNT = 48                    # as many as ship with the maquette for each noun
EPOCH = 1                     # raise it when the same base may draw others, and that of the stage `train` with it
FIRST_SEED = 1000             # none of the battery's
# Lists of lengths without a common divisor, so that no two of their combinations in turn are alike: what varies here, a subject's prompts may ask for.
VIEWS = ("a photo of a {noun}", "a close-up photo of a {noun}", "a portrait photo of a {noun} looking to the side", "a photo of a {noun} from the waist up", "a photo of a {noun} seen from the left")
CLOTHES = ("", " wearing a red shirt", " wearing a blue jacket", " wearing a white t-shirt", " wearing a black coat", " wearing a green sweater", " wearing a hat")
PLACES = ("", " on a beach", " in a kitchen", " in a forest", " in an office", " on a city street at night", " in front of a brick wall", " in a park in the sun", " in the snow", " in a library",
          " at home")


def captions_of(noun: str) -> list[str]:
    """COUNT captions of the class, no two alike, none with a trigger."""
    return [VIEWS[i % len(VIEWS)].format(noun=noun) + CLOTHES[i % len(CLOTHES)] + PLACES[i % len(PLACES)] for i in range(COUNT)]


def pictures_key(base: BaseRef, noun: str) -> str:
    """Digest of what the pictures depend on."""
    return digest.of_json({"epoch": EPOCH, "base": base.digest, "captions": captions_of(noun)})


def draw_class(base: Base, noun: str, *, progress: Callable[[int, int], None] | None = None) -> NDArray[np.uint8]:
    """A picture of each caption (M, S, S, 3), under the base's own guidance."""
    captions = captions_of(noun)
    return sample(base, captions, [FIRST_SEED + i for i in range(len(captions))], steps=STEPS, batch=BATCH, progress=progress)
