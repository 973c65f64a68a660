"""What `bench.delivered` makes of sets of samples: random sets as diverse as the delivered one, AUC of both, who is framed on the sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.delivered import SIDE_PX, Handed, accepted, centre, compared, random_sets, sheet, spread_of
from likeness.records import BlobRef, Measurements, Release, Sample, SampleSet, Verdict
from likeness.settings import load_settings
from likeness.stages import Call, StageRef
from tasks import pictures
from tasks.judging import Judgement
from tasks.runtime import Tools
from tests.likeness.fabricated import build, publish

N = 12


def handed(delivered: list[int], *, seed: int = 0) -> Handed:
    points = np.random.default_rng(seed).random((N, 2))
    images = np.stack([np.full((SIDE_PX, SIDE_PX, 3), 20 * n, np.uint8) for n in range(N)])
    return Handed("r00-900000-8", "900000", images, np.array(delivered), np.linalg.norm(points[:, None] - points[None], axis=2))


def distances(genuine: list[float], impostor: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    return np.array(genuine), np.full((N, 5), impostor) + np.linspace(-0.1, 0.1, N)[:, None]


def test_random_sets_are_as_many_samples_and_about_as_diverse() -> None:
    one = handed([0, 3, 7, 11])
    wanted, sets = spread_of(one.apart, one.delivered), random_sets(one, np.random.default_rng(1))
    assert {len(set(chosen.tolist())) for chosen in sets} == {4}
    assert len({tuple(sorted(chosen.tolist())) for chosen in sets}) > 10
    assert max(abs(spread_of(one.apart, chosen) - wanted) for chosen in sets) < 0.15 * wanted
    assert spread_of(one.apart, np.array([5])) == 0.0


def test_delivering_the_most_alike_is_better_than_chance_and_the_interval_knows_it() -> None:
    alike = [0.3 if n in (0, 3, 7, 11) else 0.75 for n in range(N)]
    users = [handed([0, 3, 7, 11], seed=n) for n in range(6)]
    found = compared(users, [distances(alike)] * 6)
    assert found["delivered"] == 1.0 and found["random"] < 0.9
    assert 0 < found["low"] <= found["difference"] <= found["high"]
    same = compared(users, [distances([0.65] * N)] * 6)
    assert abs(same["difference"]) < 0.05 and same["low"] <= 0 <= same["high"]


def test_samples_without_a_face_are_in_no_auc() -> None:
    genuine = [0.3] * N
    genuine[3] = float("nan")
    found = compared([handed([0, 3, 7, 11])], [distances(genuine)])
    assert found["delivered"] == 1.0


def test_a_centre_of_few_vectors_is_no_farther_than_one_of_many() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(0, 0.2, (400, 64)) + np.eye(64)[0]
    vectors[3] = np.nan                                           # without a face
    few, many = centre(vectors[:5]), centre(vectors)
    assert np.linalg.norm(few) == np.linalg.norm(many) == 1.0
    assert many[0] > 0.99 > few[0] > 0.7


def test_the_newest_release_is_what_was_delivered_with_what_was_drawn_besides(tmp_path: Path) -> None:
    tools = Tools(load_settings(overrides={"home": str(tmp_path)}))
    world = build(tools.bare_store)
    blank = pictures.put(tools.bare_store, "subjects/ada-900000-8/samples", np.zeros((8, 8, 3), np.uint8))
    other = pictures.put(tools.bare_store, "subjects/ada-900000-8/samples", np.full((8, 8, 3), 9, np.uint8))

    def drawn(image: BlobRef, **params: Any) -> StageRef:
        sample = Sample(adapter=world.adapter.digest, prompt="p", category="plain", seed=0, image=image)
        return publish(tools.bare_store, Call(stage="sample", subject="ada-900000-8", params=params), SampleSet(adapter=world.adapter.digest, battery="e" * 64, samples=(sample,)).plain()).ref

    def released(version: int, delivered: BlobRef, *inputs: StageRef) -> None:
        measured = Measurements(backend="dlib", bank="b" * 64, threshold=0.45, ceiling=0.25, floor=0.65, usable_portraits=5, scores=())
        verdict = Verdict.model_validate({**dict(world.verdict), "delivered": (delivered.sha256,)})
        judged = publish(tools.bare_store, Call(stage="judge", subject="ada-900000-8", inputs=inputs), Judgement(verdict=verdict, measured=measured).plain())
        release = Release(subject="ada-900000-8", model="likeness.ada", version=version, adapter=world.adapter.digest, verdict=verdict.digest)
        publish(tools.bare_store, Call(stage="register", subject="ada-900000-8", inputs=(judged.ref,)), release.plain())

    first, more = drawn(blank), drawn(other, more=1)
    released(2, other, first, more)
    released(1, blank, first)
    tools.bare_store.put_if_absent("subjects/ada-900000-8/stages/register/" + "f" * 64 + ".json", b'{"state": "claimed"}')
    [one] = accepted(tools)
    assert (one.name, one.person, one.images.shape, one.delivered.tolist()) == ("ada-900000-8", "900000", (2, 8, 8, 3), [1])


def test_what_is_called_defective_is_framed_on_the_sheet_and_nothing_else() -> None:
    bad = np.zeros(N, bool)
    bad[7] = True
    page = np.asarray(sheet([handed([0, 3, 7])], [bad], [np.zeros((64, 64, 3), np.uint8)]))
    assert page.shape == (SIDE_PX, 4 * SIDE_PX, 3)
    tiles = [page[:, SIDE_PX * n:SIDE_PX * (n + 1)] for n in range(1, 4)]
    assert [bool((tile[0, 0] == (220, 30, 30)).all()) for tile in tiles] == [False, False, True]
    assert (tiles[0] == 0).all() and (tiles[1] == 60).all()
