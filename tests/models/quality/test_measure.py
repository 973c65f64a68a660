"""What the gate reads beside identity: slots that are seen, and how unlike each other samples are."""

from __future__ import annotations

import numpy as np
import pytest

from likeness.settings import load_settings
from models.diffusion import bases
from models.maquette.companions import read_base_scores
from models.quality.measure import Identity, References, Seen, diversity, measure, nearest, slots_seen, thumbnail, with_more


@pytest.mark.parametrize(("asked", "right"), [
    ({}, (0, 0)), ({"hat": "beanie"}, (1, 1)), ({"hat": "fedora"}, (0, 1)), ({"hat": "beanie", "place": "moon"}, (1, 2)),
], ids=["nothing asked", "seen", "another value", "a slot the reader does not know"])
def test_slots_seen(asked: dict[str, str], right: tuple[int, int]) -> None:
    assert slots_seen(asked, {"hat": ("beanie", 0.9)}) == right


def test_diversity_is_zero_for_one_picture_repeated_and_grows_with_the_difference() -> None:
    grey, light, white = (thumbnail(np.full((64, 64, 3), v, np.uint8)) for v in (100, 150, 250))
    assert diversity([grey]) is None
    assert diversity([grey, grey, grey]) == 0.0
    assert diversity([grey, light]) == pytest.approx(50 / 255, abs=1e-3)
    assert diversity([grey, white]) > diversity([grey, light])


def test_a_mirrored_copy_is_as_near_as_the_picture_itself() -> None:
    one, other = (thumbnail(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)) for seed in (0, 1))
    assert nearest(one, [other, one[:, ::-1]]) == nearest(one, [other, one]) == 0.0
    far = nearest(one, [other])
    assert far is not None and far > 0.05
    assert nearest(one, []) is None


def test_what_is_drawn_besides_is_measured_as_if_it_had_been_there_and_changes_nothing_else() -> None:
    rng = np.random.default_rng(4)
    pictures = rng.random((7, 32, 32, 3), dtype=np.float32)
    vectors, bank = rng.normal(0, 1, (12, 8)).astype(np.float32), rng.normal(0, 3, (50, 8)).astype(np.float32)
    references = References(Identity("dlib", "b" * 64, vectors[:2], vectors[:5], bank), pictures[:1])
    seen = [Seen(f"{n:064x}", "plain", 1, vectors[5 + n], pictures[n]) for n in range(7)]
    first, whole = measure(seen[:4], references, bare=seen[:1]), measure(seen, references, bare=seen[:1])
    both = with_more(first, [s.thumbnail for s in seen[:4]], seen[4:], references)
    assert (both.scores, both.more, both.apart) == (whole.scores[:4], whole.scores[4:], whole.apart)
    assert both.model_copy(update={"more": (), "apart": first.apart}) == first


@pytest.mark.parametrize("noun", ["man", "woman", "person"])
def test_the_shipped_base_scores_are_of_the_shipped_base_and_battery(noun: str) -> None:
    revision, battery = bases.reference("maquette").revision, load_settings().battery.digest
    scores = read_base_scores(noun, revision=revision, battery=battery)
    assert scores is not None
    assert scores.one_face_share >= 0.8
    assert scores.spread is not None and 0 < scores.spread < (scores.diversity or 0)
    assert sum(asked for _, asked in scores.slots.values()) == 4 * sum(len(p.slots) for p, _ in load_settings().battery.every())
    sampling = load_settings().sampling
    assert read_base_scores(noun, revision=revision, battery=battery, sampling=sampling) == scores
    assert read_base_scores(noun, revision=revision, battery=battery, sampling=sampling.model_copy(update={"steps": 4})) is None
    assert read_base_scores(noun, revision="another", battery=battery) is None
    assert read_base_scores(noun, revision=revision, battery="another") is None
