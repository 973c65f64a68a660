"""The worth of a checkpoint: a few pictures of the battery, looked at by recogniser and slot reader.

Who chooses shares as little as possible with who judges: other seeds than the battery's, and of several witnesses only `witnesses_for_choice`. What
it shares, the recogniser and the prompts, docs/gate.md says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from likeness import gate
from likeness.recipe import Choice
from likeness.records import BatteryPrompt, Caption, CurvePoint, Portrait
from models.diffusion.bases import Base
from models.diffusion.sampler import sample
from models.quality import measure

FIRST_SEED = 10_000            # a battery has 64 seeds at most, and begins at 0


class Recogniser(Protocol):
    """What is needed of `models.faces.tools.FaceTools`."""

    def find_faces(self, picture: NDArray[np.uint8]) -> list[Any]: ...
    def embed_faces(self, picture: NDArray[np.uint8], faces: Sequence[Any]) -> NDArray[np.float32]: ...


class Reader(Protocol):
    """What is needed of `models.captions.slots.SlotReader`."""

    def read(self, crops_NSSC: NDArray[np.uint8]) -> list[dict[str, tuple[str, float]]]: ...


def witnesses_for_choice(held_out: Sequence[Portrait]) -> tuple[Portrait, ...]:
    """The witnesses that have a part in choosing: one of up to three, so that the gate has others wherever there are any."""
    return tuple(held_out[:1])


def contradictions(prompts: Sequence[BatteryPrompt], captions: Sequence[Caption]) -> list[dict[str, str]]:
    """For each prompt, the slots in which it asks for another value than most captions name. What no caption names, no photo is known to show."""
    named = {slot for caption in captions for slot in caption.slots}
    usual = {slot: _commonest([c.slots[slot] for c in captions if slot in c.slots]) for slot in named}
    return [{slot: value for slot, value in prompt.slots.items() if usual.get(slot) != value} for prompt in prompts]


def _commonest(values: Sequence[str]) -> str:
    """The value that is there most often; of equals the first in the alphabet."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]


@dataclass(frozen=True)
class Sheet:
    """The small fixed sample set: prompts, seeds, and what must be seen that the photos do not show."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    categories: tuple[str, ...]
    asked: tuple[Mapping[str, str], ...]

    @staticmethod
    def of(prompts: Sequence[BatteryPrompt], captions: Sequence[Caption], *, who: str, seeds: int) -> Sheet:
        """`seeds` pictures of every prompt of a battery, each with a seed of its own; `who` stands for the person, e.g. "zqaa woman".

        Pictures of one seed show one composition under every prompt: eight of them would be one picture of the person, not eight.
        """
        rows = [(prompt, asked) for prompt, asked in zip(prompts, contradictions(prompts, captions), strict=True) for _ in range(seeds)]
        return Sheet(tuple(p.text(who) for p, _ in rows), tuple(range(FIRST_SEED, FIRST_SEED + len(rows))), tuple(p.category for p, _ in rows), tuple(a for _, a in rows))


@dataclass(frozen=True)
class Scorer:
    """Scores the adapter that is in place in the base."""

    base: Base
    faces: Recogniser
    reader: Reader
    sheet: Sheet
    identity: measure.Identity
    choice: Choice
    guidance: float | None
    batch: int = 8
    tell: Callable[[int, int], None] = lambda done, total: None        # pictures drawn, of so many

    def __call__(self, step: int) -> CurvePoint:
        images = sample(self.base, self.sheet.prompts, self.sheet.seeds, steps=self.choice.denoising_steps, guidance=self.guidance, batch=self.batch, progress=self.tell)
        return point(step, images, self.sheet, self.identity, faces=self.faces, reader=self.reader)


def point(step: int, images_NSSC: NDArray[np.uint8], sheet: Sheet, identity: measure.Identity, *, faces: Recogniser, reader: Reader) -> CurvePoint:
    """The scores of pictures of a sheet.

    Identity is the mean position of the unstylised ones, as the gate measures it: without exactly one face a picture counts 0, like one whose vector is
    not finite. It is None where no position can be measured at all: without witnesses, or where the subject's photos are as far from each other as from strangers.
    """
    seen = []
    for image, category, asked in zip(images_NSSC, sheet.categories, sheet.asked, strict=True):
        found = faces.find_faces(image)
        vector = faces.embed_faces(image, found)[0] if len(found) == 1 else None
        right, of = measure.slots_seen(asked, reader.read(image[None])[0]) if asked else (0, 0)
        seen.append(measure.Seen("0" * 64, category, len(found), vector, measure.thumbnail(image), slots_right=right, slots_asked=of))
    asked_for = sum(s.slots_asked for s in seen)
    return CurvePoint(step=step, identity=_identity(seen, identity), samples=len(seen),
                      obedience=sum(s.slots_right for s in seen) / asked_for if asked_for else None)


def _identity(seen: Sequence[measure.Seen], identity: measure.Identity) -> float | None:
    if not len(identity.witnesses) or not np.isfinite(identity.witnesses).all():
        return None
    floor, plain = identity.recogniser.floor, [s for s in seen if s.category != gate.STYLISED]
    if not plain or gate.position(floor, floor=floor, ceiling=identity.recogniser.ceiling) is None:
        return None
    return sum(identity.place(s, s.embedding)[1] or 0.0 for s in plain) / len(plain)
