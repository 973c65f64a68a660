"""The benchmark's own arithmetic: what is kept, what is asked for, how likeness is scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import attributes, faces, gate, personalisation
from bench.cells import Cells
from bench.drawing import bytes_digest, chance, full_prompts
from bench.strangers import plant
from likeness.gate import GATED
from models.faces import align
from models.faces.face import Face
from models.maquette.vocabulary import SLOTS
from models.quality.planting_features import ALL_PLANTS as PLANTS
from models.quality.planting_features import CHECKERS, FEATURE_PLANTS, NAMES

ROWS = [{"identity": f"{i:06d}", "style": "photo", "sex": "female", "age": "young", "hair_colour": "black", "hair_cut": "bob", "beard": "none",
         "expression": "smile", "garment": garment, "colour": "red", "second_colour": "none", "pattern": "plain", "eyewear": "none", "hat": "none",
         "place": place, "place_colour": "none", "light": "warm"}
        for i, (garment, place) in enumerate([("shirt", "beach"), ("t-shirt", "forest"), ("suit", "park")] * 10)]


def test_a_cell_is_made_once_and_again_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"n": len(made)}

    cells = Cells(tmp_path)
    assert [cells.numbers("a", {"w": 1}, make)["n"] for _ in range(2)] == [1, 1]
    assert cells.numbers("a", {"w": 2}, make)["n"] == 2
    assert cells.numbers("b", {"w": 1}, make)["n"] == 3


def test_an_interrupted_cell_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path).arrays("a", {}, broken)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(Cells(tmp_path).arrays("a", {}, lambda: {"x": np.arange(3)})["x"], [0, 1, 2])


def test_full_prompts_name_what_they_ask_for() -> None:
    prompts, asked = full_prompts(ROWS, 60)
    for prompt, a in zip(prompts, asked, strict=True):
        assert SLOTS["expression"].phrases[a["expression"]] in prompt
        assert SLOTS["place"].phrases[a["place"]] in prompt
        assert ("without glasses" if a["eyewear"] == "none" else a["eyewear"]) in prompt
        assert ("without a hat" if a["hat"] == "none" else a["hat"]) in prompt
    # drawn evenly: a base deaf to the prompt cannot score by drawing what is most frequent in the data
    assert chance("eyewear", asked) < 0.6


def test_colours_are_not_asked_of_black_and_white_photos() -> None:
    grey = [row | {"style": "black and white"} for row in ROWS[:2]]
    assert attributes.labels(grey)["colour"].tolist() == [-1, -1]
    assert attributes.labels(ROWS[:1])["colour"].tolist() == [list(SLOTS["colour"].phrases).index("red")]


def test_the_classifier_learns_saves_and_loads(tmp_path: Path) -> None:
    """Toy renders whose light is their brightness: learnt on some people, known on others; the file gives the same answers."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    rows = [ROWS[0] | {"identity": f"{i // 4:06d}", "light": "dim" if i % 2 else "sunny"} for i in range(160)]
    crops = np.stack([np.full((64, 64, 3), 40 if i % 2 else 210, np.uint8) + rng.integers(0, 20, (64, 64, 3), np.uint8) for i in range(160)])
    np.save(tmp_path / "data" / "crops.npy", crops)
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    right = attributes.train(tmp_path, tmp_path / "a.safetensors", epochs=8, batch=16)
    assert right["light"] == 1.0
    net, stated = attributes.load(tmp_path / "a.safetensors")
    assert stated == right
    assert attributes.accuracy(attributes.predict(net, crops[-8:]), rows[-8:])["light"] == 1.0


@pytest.mark.parametrize(("drawn_as", "auc", "accepted"), [("themselves", 1.0, 1.0), ("the other", 0.0, 0.0)], ids=["own face", "another's face"])
def test_score_knows_a_person_from_an_impostor(drawn_as: str, auc: float, accepted: float) -> None:
    a, b = np.zeros(128, np.float32), np.full(128, 0.1, np.float32)
    users = [personalisation.User(name, "woman", np.zeros((0, 8, 8, 3), np.uint8), np.stack([v, v])) for name, v in (("a", a), ("b", b))]
    faces = [a, b] if drawn_as == "themselves" else [b, a]
    seen = [(np.array([1, 1, 1, 2]), np.stack([face] * 4)) for face in faces]
    got = personalisation.score(seen, users, users, np.array([True, True, False, True]))
    assert got["auc"] == auc
    assert got["one_face"] == pytest.approx(2 / 3)              # of three unstylised samples one shows two faces
    assert got["true_accepts"] == pytest.approx(accepted * 2 / 3)     # and counts as not accepted


def test_digest_sees_every_pixel() -> None:
    image = np.zeros((2, 4, 4, 3), np.uint8)
    other = image.copy()
    other[1, 3, 3, 2] = 1
    assert bytes_digest(image) != bytes_digest(other)


def test_verification_figures_of_people_who_are_told_apart_and_of_a_crowd() -> None:
    rng = np.random.default_rng(4)
    centres, who = np.eye(4, 8) * 0.7, np.repeat(np.array(list("abcd")), 5)
    apart = faces.verify((np.repeat(centres, 5, 0) + 0.02 * rng.standard_normal((20, 8))).astype(np.float32), who)
    assert apart["auc"] == 1.0 and apart["true_accepts"] == {"0.001": 1.0, "0.01": 1.0} and apart["at_same_person"] == [1.0, 0.0]
    assert (apart["photos"], apart["people"], apart["without_face"]) == (20, 4, 0) and apart["to_centroid_at_gate"] == [1.0, 0.0]
    crowd = rng.standard_normal((20, 8)).astype(np.float32)
    crowd[3] = np.nan
    mixed = faces.verify(crowd, who)
    assert 0.3 < mixed["auc"] < 0.7 and mixed["without_face"] == 1


def test_sets_name_their_people_and_a_limit_is_per_person(shared: Path) -> None:
    sets = {s.name: s for s in faces.read_sets(shared, 3)}
    assert {"persons/orl", "persons/suaresito", "persons_multi", "rendered users", "objects/caosdelola_dog"} <= sets.keys()
    assert len(sets["persons/orl"].files) == 60 and len(set(sets["persons/orl"].people)) == 20
    assert sets["objects/caosdelola_dog"].shown == 0 and not any(sets["objects/caosdelola_dog"].people)


def test_strangers_far_away_are_found_and_near_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    who = np.repeat(np.array(["a", "b", "c"]), 12)
    far = {"a": 0.0, "b": 5.0, "c": -5.0}
    vectors = np.array([[far[w], 0.0] for w in who], np.float32) + rng.normal(0, 0.05, (36, 2)).astype(np.float32)
    vectors[3] = np.nan
    apart = plant(vectors, who)
    assert (apart["recall"], apart["good_refused"]) == (1.0, 0.0)
    assert plant(vectors * np.float32(0.01), who)["recall"] == 0.0


# -- planted defects

SIDE = 160
FACE = Face((50.0, 50.0, 110.0, 120.0), (align.template_in_crop(128) - 64) * 0.8 + 80, 1.0)


def toy(seed: int) -> np.ndarray:
    """A smooth picture with some grain, in which every defect leaves a trace."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 255, (10, 10, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(rough).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(large + rng.integers(-6, 7, large.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", list(PLANTS))
def test_every_plant_changes_its_picture_alone_keeps_its_size_and_is_repeatable(name: str) -> None:
    picture, other = toy(1), toy(2)
    before = picture.copy(), other.copy()
    made, again, another = (PLANTS[name](picture, FACE, other, FACE, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (made.shape, made.dtype) == (picture.shape, np.uint8)
    np.testing.assert_array_equal(made, again)
    assert np.abs(made.astype(int) - picture).max() > 8
    assert (made != another).any()
    np.testing.assert_array_equal(picture, before[0])
    np.testing.assert_array_equal(other, before[1])


@pytest.mark.parametrize("name", ["moved eye", "mirrored eye", "melted patch", "plastic skin", "erased face", *FEATURE_PLANTS])
def test_defects_of_the_face_leave_the_corners_alone(name: str) -> None:
    picture = toy(1)
    made = PLANTS[name](picture, FACE, toy(2), FACE, np.random.default_rng(3))
    np.testing.assert_array_equal(made[:10, :10], picture[:10, :10])
    np.testing.assert_array_equal(made[-6:, -6:], picture[-6:, -6:])


def test_recall_and_precision_are_of_the_named_finding_and_its_clean_twins() -> None:
    clean = [[], ["blur"], [], ["grid"]]
    rows = gate.figures(clean, {"blur": [["blur"], ["blur", "grid"], ["no_face"], []], "grid": [[]] * 4, "moved eye": [["blur"], [], [], []]})
    assert rows["blur"] == {"recall": 0.75, "precision": 0.75, "held_back": 0.75}
    assert rows["grid"] == {"recall": 0.0, "precision": 0.0, "held_back": 0.0}
    assert rows["moved eye"] == {"recall": 0.0, "precision": None, "held_back": 0.25}


def test_a_type_is_earned_on_every_set_and_by_both_figures() -> None:
    good, poor = {"recall": 0.95, "precision": 0.9}, {"recall": 0.95, "precision": 0.89}
    rest = dict.fromkeys(CHECKERS, poor)
    assert gate.earned({"a": rest | {"blur": good, "grid": good}, "b": rest | {"blur": good}}) == {"blur", "unmeasured", "unsafe"}
    eyes = [plant for plant, code in CHECKERS.items() if code == "eyes"]
    assert "eyes" in gate.earned({"a": rest | dict.fromkeys(eyes, good)}) and "eyes" not in gate.earned({"a": rest | dict.fromkeys(eyes[1:], good)})
    assert gate.earned({"a": rest | {"blur": {"recall": 0.95, "precision": None}}}) == {"unmeasured", "unsafe"}


def test_what_is_gated_is_what_was_earned() -> None:
    measured = json.loads(gate.PLANTED.read_text())
    assert gate.earned(measured["sets"]) == GATED, "run `python -m bench.gate --accept` and set likeness.gate.GATED to what it says"
    assert min(measured["pictures"].values()) >= 40
    assert {plant for rows in measured["sets"].values() for plant in rows} == set(PLANTS) == set(NAMES)
