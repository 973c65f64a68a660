"""Digests: equal content, equal name; on every machine, for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from likeness import digest

PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
                     lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4), max_leaves=12)


@pytest.mark.parametrize(("value", "text"), [
    ({"b": 1, "a": [1.5, None, True]}, '{"a":[1.5,null,true],"b":1}'),
    ({"ä": "é\n"}, '{"ä":"é\\n"}'),
    ({"B": 0, "a": 0, "ä": 0}, '{"B":0,"a":0,"ä":0}'),
    ((1, (2,)), "[1,[2]]"),
    (1e-7, "1e-07"),
    (0.1 + 0.2, "0.30000000000000004"),
    (2**70, str(2**70)),
    ({}, "{}"),
], ids=["sorted", "unicode", "code points", "tuples", "small", "shortest repr", "big", "empty"])
def test_canonical_json_is_this(value: Any, text: str) -> None:
    assert digest.canonical(value) == text.encode()


def test_known_digests_stay_what_they_are() -> None:
    assert digest.of_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest.of_json({"b": 1, "a": [1.5, None, True]}) == digest.of_bytes(b'{"a":[1.5,null,true],"b":1}')


@given(PLAIN)
def test_a_round_trip_through_json_keeps_the_digest(value: Any) -> None:
    assert digest.of_json(json.loads(json.dumps(value))) == digest.of_json(value)


@given(st.dictionaries(st.text(max_size=5), st.integers(), min_size=2, max_size=6), st.randoms())
def test_the_order_of_keys_is_nothing(value: dict[str, int], rng: Any) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert digest.of_json(dict(items)) == digest.of_json(value)


def test_alike_is_not_equal() -> None:
    values: list[Any] = [1, 1.0, True, "1", [1], None, "null", {}, [], "", 0, False, {"a": 1}, {"a": None}]
    assert len({digest.of_json(v) for v in values}) == len(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {1: "a"}, {"a": {None: 1}}, b"bytes", {"a": {1, 2}}, object()],
                         ids=["nan", "inf", "nested inf", "int key", "nested None key", "bytes", "set", "object"])
def test_what_has_no_canonical_json_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"digest|canonical JSON"):
        digest.of_json(value)


def test_another_process_with_another_hash_seed_agrees(root: Path) -> None:
    program = "from likeness import digest; print(digest.of_json({k: {k} == {k} for k in 'zyxab'}))"
    found = {subprocess.run([sys.executable, "-c", program], cwd=root, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
             for seed in ("1", "2")}
    assert found == {digest.of_json(dict.fromkeys("abxyz", True)) + "\n"}
