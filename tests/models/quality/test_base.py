"""What the base alone does on a battery: drawn and measured, and held against Adapters."""

from __future__ import annotations

import numpy as np
import pytest

from likeness.records import BatteryPrompt
from likeness.settings import Battery, Sampling
from models.captions.slots import SlotReader
from models.diffusion import bases
from models.faces.tools import dlib_tools
from models.quality.base import SEEDS, measure_base, scores_key, spread_of

BATTERY = Battery(name="two", seeds=4, prompts=(BatteryPrompt(category="place", template="a photo of a {who} on a beach", slots={"place": "beach"}),
                                                BatteryPrompt(category="style", template="a painting of a {who}", slots={"style": "painting"})))
SAMPLING = Sampling(steps=3)


def test_a_base_is_measured_on_a_battery_by_category_with_seeds_enough() -> None:
    base, reader = bases.load("maquette"), SlotReader.load(bases.MAQUETTE / "weights" / "clip")
    told: list[tuple[int, int]] = []
    found = measure_base(base, dlib_tools(), reader, BATTERY, SAMPLING, "woman", progress=lambda done, total: told.append((done, total)))
    assert found.samples == 2 * SEEDS and told[-1] == (found.samples, found.samples)
    assert {category: asked for category, (_, asked) in found.slots.items()} == {"place": SEEDS, "style": SEEDS}
    assert found.by_category == {category: seen / asked for category, (seen, asked) in found.slots.items()}
    assert found.editability == pytest.approx(sum(found.by_category.values()) / 2)
    assert (found.steps, found.guidance, found.battery, found.revision) == (3, SAMPLING.guidance, BATTERY.digest, base.ref.revision)


def test_what_scores_depend_on_is_in_their_key_and_how_many_are_drawn_at_once_is_not() -> None:
    reference, tools = bases.reference("maquette"), dlib_tools()

    def key(battery: Battery = BATTERY, sampling: Sampling = SAMPLING, noun: str = "woman", slots: str = "a") -> str:
        return scores_key(reference, tools, slots, battery, sampling, noun)
    assert len({key(), key(noun="man"), key(slots="b"), key(sampling=Sampling(steps=4)), key(sampling=Sampling(steps=3, guidance=2.0)),
                key(battery=BATTERY.model_copy(update={"seeds": 2}))}) == 6
    assert key(sampling=Sampling(steps=3, batch=1, bare=9)) == key()


def test_the_spread_of_pictures_is_that_of_the_four_that_differ_most() -> None:
    grey = [np.full((64, 64, 3), v, np.uint8) for v in (0, 51, 102, 153, 154)]
    assert spread_of(grey) == pytest.approx(0.2, abs=1e-3)
    assert spread_of(grey[:3]) is None
    assert spread_of([grey[0]] * 9 + [grey[4]]) == 0.0
