"""What a base does by itself on a battery, nobody being personalised: an Adapter is held against it (`likeness.gate`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from likeness import digest, gate
from likeness.records import BaseRef, BaseScores
from likeness.settings import Battery, Sampling
from models.captions.slots import SlotReader
from models.diffusion.bases import Base
from models.diffusion.sampler import sample
from models.faces.face import Picture
from models.faces.tools import FaceTools
from models.quality import measure

SEEDS = 8                # of each prompt at least
EPOCH = 1                # raise it when the same base may get other scores


def scores_key(base: BaseRef, faces: FaceTools, slots: str, battery: Battery, sampling: Sampling, noun: str) -> str:
    """Digest of what scores depend on; `slots` is the digest of the network that reads pictures."""
    return digest.of_json({"epoch": EPOCH, "base": base.digest, "detector": faces.detector.name, "slots": slots, "battery": battery.digest,
                           "steps": sampling.steps, "guidance": sampling.guidance, "noun": noun})


def measure_base(base: Base, faces: FaceTools, slots: SlotReader, battery: Battery, sampling: Sampling, noun: str, *,
                 progress: Callable[[int, int], None] | None = None) -> BaseScores:
    """Draw the battery with the base alone, `SEEDS` seeds of each prompt, and measure what is drawn. On the maquette two minutes of one core."""
    wanted = battery.model_copy(update={"seeds": max(SEEDS, battery.seeds)}).every()
    images = sample(base, [p.text(noun) for p, _ in wanted], [s for _, s in wanted], steps=sampling.steps, guidance=sampling.guidance, batch=sampling.batch, progress=progress)
    seen = [(prompt.category, seed, *measure.slots_seen(prompt.slots, slots.read(image[None])[0] if prompt.slots else {}), len(faces.find_faces(image)), image)
            for (prompt, seed), image in zip(wanted, images, strict=True)]
    counts: dict[str, tuple[int, int]] = {}
    for category, _, right, asked, _, _ in seen:
        if asked:
            before = counts.get(category, (0, 0))
            counts[category] = before[0] + right, before[1] + asked
    asked_in_all = sum(n for _, n in counts.values())
    plain = [(seed, count, image) for category, seed, _, _, count, image in seen if category != gate.STYLISED]
    groups = [[image for seed, count, image in plain if seed // battery.seeds == group and count == 1] for group in range(max(SEEDS, battery.seeds) // battery.seeds)]
    spreads = [spread for group in groups if (spread := spread_of(group)) is not None]
    return BaseScores(
        revision=base.ref.revision, battery=battery.digest, steps=sampling.steps, guidance=sampling.guidance, noun=noun, samples=len(images),
        one_face_share=float(np.mean([count == 1 for _, _, _, _, count, _ in seen])),
        editability=sum(right for right, _ in counts.values()) / asked_in_all if asked_in_all else None,
        by_category={category: right / asked for category, (right, asked) in counts.items()}, slots=counts,
        diversity=measure.diversity([measure.thumbnail(image) for _, _, image in plain]), spread=float(np.mean(spreads)) if spreads else None)


def spread_of(pictures: list[Picture]) -> float | None:
    """`likeness.gate.spread` of all these pictures."""
    return gate.spread(measure.distances([measure.thumbnail(picture) for picture in pictures]), range(len(pictures)))
