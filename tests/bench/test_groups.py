"""Errors by group: the arithmetic, on hand-made people."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import groups
from likeness.calibration import Rate
from likeness.gate import GatePolicy
from models.maquette.companions import Bank


def test_errors_are_counted_by_what_people_are_and_by_what_their_photos_show() -> None:
    rng = np.random.default_rng(0)
    bank = Bank("dlib", "d" * 64, np.eye(8, dtype=np.float32)[rng.integers(2, 8, 50)])

    def person(name: str, axis: int, odd: bool, **what: Any) -> groups.Person:
        vectors = np.eye(8, dtype=np.float32)[[axis] * 10] * 0.6 + rng.normal(0, 0.01, (10, 8)).astype(np.float32)
        if odd:
            vectors[9] = -vectors[9]                        # a photo that nobody recognises
        rows = [{"skin_luminance": 0.3, "age": "old", "sex": "female", "beard": "none", "view": "in profile facing left" if n == 9 else "looking to the left" if n == 8 else "frontal", "eyewear": "glasses" if n == 9 else "none"} | what for n in range(10)]
        return groups.Person(name, rows, vectors)

    people = [person("1", 0, True), person("2", 0, False), person("3", 1, False, skin_luminance=0.5), person("4", 1, False, sex="male", beard="full")]
    found = groups.table(people, bank, GatePolicy())
    everybody = found["everybody"]["everybody"]
    assert (everybody["people"], everybody["refused"]["wrong"], everybody["refused"]["n"]) == (4, 1, 8)
    assert (everybody["accepted"]["wrong"], everybody["accepted"]["n"]) == (3, 12), "1 and 2 look alike, and one photo is odd"
    assert {group: (row["refused"]["wrong"], row["refused"]["n"], row["accepted"]) for group, row in found["eyewear"].items()} == {"none": (0, 4, None), "glasses": (1, 4, None)}
    assert {group: (row["people"], row["refused"]["n"], row["accepted"] and row["accepted"]["n"]) for group, row in found["skin luminance"].items()} == {
        "0.2 to 0.4": (3, 6, 8), "0.4 and more": (1, 2, 4)}
    assert (found["sex"]["male"]["people"], found["sex"]["male"]["refused"]["n"], found["sex"]["male"]["accepted"]) == (1, 2, None)
    assert found["beard"]["with beard"]["people"] == 1
    assert {group: (row["refused"]["wrong"], row["refused"]["n"]) for group, row in found["view"].items()} == {"turned": (0, 4), "profile": (1, 4)}
    assert groups.printed({"recognisers": {"dlib": found}}).row_count == 12
    assert all(groups.differing(kind) == [] for kind in found.values()), "so few people say nothing"


def test_groups_differ_where_their_intervals_do_not_meet() -> None:
    def row(wrong: int, people: int = 50) -> dict[str, Any]:
        return {"people": people, "refused": Rate.of([(int(k < wrong), 4) for k in range(people)]).plain(), "accepted": None}

    assert groups.differing({"young": row(2), "old": row(40)}) == ["own photos refused: old 20.0 %, young 1.0 %"]
    assert groups.differing({"young": row(2), "old": row(4)}) == []
