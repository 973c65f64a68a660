"""Errors by group: the arithmetic, on hand-made people."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import groups
from likeness.gate import GatePolicy
from models.maquette.companions import Bank


def test_errors_are_counted_by_what_people_are_and_by_what_their_photos_show() -> None:
    rng = np.random.default_rng(0)
    bank = Bank("dlib", "d" * 64, np.eye(8, dtype=np.float32)[rng.integers(2, 8, 50)])

    def person(name: str, axis: int, odd: bool, **what: Any) -> groups.Person:
        vectors = np.eye(8, dtype=np.float32)[[axis] * 8] * 0.6 + rng.normal(0, 0.01, (8, 8)).astype(np.float32)
        if odd:
            vectors[7] = -vectors[7]                        # a photo that nobody recognises
        rows = [{"skin_luminance": 0.3, "age": "old", "sex": "female", "beard": "none", "eyewear": "glasses" if n == 7 else "none"} | what for n in range(8)]
        return groups.Person(name, rows, vectors)

    people = [person("1", 0, True), person("2", 0, False), person("3", 1, False, skin_luminance=0.5), person("4", 1, False, sex="male", beard="full")]
    found = groups.table(people, bank, GatePolicy())
    assert found["everybody"]["everybody"] == {"people": 4, "own": 8, "refused": 1, "others": 12, "accepted": 3}, "1 and 2 look alike, and one photo is odd"
    assert found["eyewear"] == {"none": {"people": 0, "own": 4, "refused": 0, "others": 0, "accepted": 0}, "glasses": {"people": 0, "own": 4, "refused": 1, "others": 0, "accepted": 0}}
    assert found["skin luminance"]["0.4 and more"] == {"people": 1, "own": 2, "refused": 0, "others": 4, "accepted": 0}
    assert found["sex"]["male"] == {"people": 1, "own": 2, "refused": 0, "others": 0, "accepted": 0}
    assert found["beard"]["with beard"]["people"] == 1
    assert groups.printed({"recognisers": {"dlib": found}}).row_count == 10
