"""A checker that fails or gives no number never passes anything: every measure that the gate reads, broken in every way, through the product's own eyes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness import gate
from likeness.errors import IntegrityError
from likeness.gate import GatePolicy, judge
from likeness.records import BaseScores, Measurements, Verdict
from models.faces import align
from models.faces.face import Face, Picture
from models.faces.tools import EllipseMask, FaceTools
from models.quality import findings, measure
from models.quality.looking import Looker

SIDE, DIGEST = 128, "0" * 64
PERSON = np.array([0.2, 0.0, 0.0], np.float32)
BANK = np.array([[0.2, 0.6 + 0.001 * n, 0.0] for n in range(200)], np.float32)
POLICY = GatePolicy(max_drift_share=0.25)
BASE = BaseScores(revision="1", battery=DIGEST, steps=20, guidance=3.0, noun="man", samples=64, one_face_share=1.0, editability=0.5, by_category={}, slots={"place": (32, 64)},
                  diversity=0.25, spread=0.2)
NOBODY = np.array([0.2, 0.7, 0.0], np.float32)


@dataclass
class Network:
    """Detector, recogniser, reader of slots and of what is unsafe in one, of whom each answer can be another."""

    faces: Callable[[], list[Face]] = lambda: [Face((20.0, 20.0, 108.0, 108.0), align.template_in_crop(SIDE), 1.0)]
    vector: Callable[[], Any] = lambda: PERSON
    place: Callable[[], tuple[str, float]] = lambda: ("beach", 0.9)
    belief: Callable[[], Any] = lambda: 0.01
    name: str = "made"
    licence: str = "none"
    same_person_distance: float = 0.6

    def find_faces(self, picture: Picture) -> list[Face]:
        return self.faces()

    def embed_faces(self, picture: Picture, faces: Any) -> Any:
        return np.asarray([self.vector() for _ in faces])

    def read(self, crops: Any) -> list[dict[str, tuple[str, float]]]:
        return [{"place": self.place()} for _ in crops]

    def unsafe(self, picture: Picture) -> Any:
        return self.belief()


def pictures(count: int) -> list[Picture]:
    """Sharp faces of a kind, each with light from another side, so that none repeats another."""
    rng, made = np.random.default_rng(0), []
    ramp = np.linspace(-85, 85, SIDE)
    for n in range(count):
        turn = math.pi * (n + 0.5) / count                        # half a circle: in the other half is the mirror
        light = math.cos(turn) * ramp[:, None] + math.sin(turn) * ramp[None, :]
        made.append(np.clip(128 + light[..., None] + rng.normal(0, 12, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8).repeat(3, 2))
    return made


PICTURES = pictures(18)
OWN = np.stack([PERSON + np.float32([0.0, 0.0, 0.05 * s]) for s in (-1, 1, -1, 1, -1, 1)])
LIMITS = findings.usual(PICTURES[:6], base="none")


def judged(network: Network, *, second: Network | None = None, bare: Network | None = None, own: Any = OWN, second_own: Any = OWN, bank: Any = BANK, base: BaseScores | None = BASE,
           limits: findings.Usual = LIMITS) -> Verdict:
    """Twelve samples and four of nobody in particular, looked at and judged as `tasks.judging` does; `own` are witnesses and portraits."""
    def eyes(of: Network) -> Looker:
        return Looker(FaceTools(of, of, EllipseMask(), second_embedder=second), of, limits, of)        # type: ignore[arg-type]

    def identity(vectors: Any) -> measure.Identity:
        return measure.Identity("made", DIGEST, vectors[:2], vectors, bank)

    seen = [eyes(network).see(p, name=f"{n:064x}", category="place", slots={"place": "beach"}) for n, p in enumerate(PICTURES[6:])]
    stranger = Network(vector=lambda: NOBODY)
    none = [eyes(bare or stranger).see(p, name=f"{n:063x}b", category="bare", slots={}) for n, p in enumerate(PICTURES[6:10])]
    references = measure.References(identity(own), np.stack([measure.thumbnail(p) for p in PICTURES[:6]]), base=base, second=None if second is None else identity(second_own))
    return judge(measure.measure(seen, references, bare=none), POLICY)


def raising() -> Any:
    raise RuntimeError("the network failed")


NO_NUMBER = [np.full(3, v, np.float32) for v in (math.nan, math.inf, -math.inf)]


def test_what_is_broken_below_is_accepted_where_nothing_is() -> None:
    assert judged(Network()).kind == "accepted", judged(Network()).reasons
    assert judged(Network(), second=Network()).kind == "accepted"


@pytest.mark.parametrize("broken", [
    lambda: judged(Network(faces=raising)), lambda: judged(Network(faces=list)),
    lambda: judged(Network(faces=lambda: [Face((0.0, 0.0, 1.0, 1.0), np.full((5, 2), math.nan), 1.0)])),
    lambda: judged(Network(vector=raising)), *[lambda v=v: judged(Network(vector=lambda: v)) for v in NO_NUMBER],
    lambda: judged(Network(place=raising)), lambda: judged(Network(place=lambda: ("beach", math.nan))),
    lambda: judged(Network(belief=raising)), *[lambda v=v: judged(Network(belief=lambda: v)) for v in (math.nan, math.inf, -1.0, None)],
    lambda: judged(Network(), second=Network(vector=raising)), *[lambda v=v: judged(Network(), second=Network(vector=lambda: v)) for v in NO_NUMBER],
    lambda: judged(Network(), bare=Network(vector=raising)), *[lambda v=v: judged(Network(), bare=Network(vector=lambda: v)) for v in NO_NUMBER],
    lambda: judged(Network(), own=np.full_like(OWN, np.nan)), lambda: judged(Network(), own=OWN[:1]), lambda: judged(Network(), second=Network(), second_own=np.full_like(OWN, np.nan)),
    lambda: judged(Network(), second=Network(), second_own=np.concatenate([OWN[:5], np.full_like(OWN[:1], np.nan)])),
    lambda: judged(Network(), bank=np.full_like(BANK, np.nan)), lambda: judged(Network(), bank=BANK[:0]), lambda: judged(Network(), bank=np.concatenate([BANK, np.full_like(BANK[:1], np.inf)])),
    lambda: judged(Network(), base=None), lambda: judged(Network(), base=BASE.model_copy(update={"spread": None})), lambda: judged(Network(), base=BASE.model_copy(update={"slots": {}})),
    *[lambda v=v: judged(Network(), base=BASE.model_copy(update={"spread": v})) for v in (math.nan, math.inf, -math.inf)],
    lambda: judged(Network(), limits=replace(LIMITS, limits={})), lambda: judged(Network(), limits=replace(LIMITS, limits=dict.fromkeys(LIMITS.limits, math.nan))),
    lambda: judged(Network(), limits=replace(LIMITS, own_skin=np.full((1, 2), math.nan))),
])
def test_what_is_not_measured_is_never_accepted(broken: Callable[[], Verdict]) -> None:
    with suppress(RuntimeError, IntegrityError, ValueError):          # whoever fails ends the run, which accepts nothing either
        assert broken().kind != "accepted"


@pytest.mark.parametrize("code", sorted(findings.SIGNS))
@pytest.mark.parametrize("read", [lambda view: math.nan, lambda view: math.inf, lambda view: None, lambda view: 1 / 0], ids=["nan", "inf", "none", "raises"])
def test_a_sign_that_fails_is_never_accepted(code: Any, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "SIGNS", dict(findings.SIGNS) | {code: replace(findings.SIGNS[code], read=read)})
    found = judged(Network())
    assert (found.kind, {r.code for r in found.reasons}) == ("retry", {"defects"})


def test_a_reader_that_gives_no_number_says_so_instead_of_naming_the_first_value() -> None:
    with pytest.raises(IntegrityError, match="no number for place"):
        judged(Network(place=lambda: ("beach", math.nan)))


# -- the rules themselves: records allow no NaN, but a rule must not lean on that

GOOD = {"image": DIGEST, "category": "place", "faces": 1, "identity_distance": 0.2, "position": 0.9, "nearest_training": 0.2, "second_distance": 0.2, "second_position": 0.9}
BROKEN = st.sampled_from([None, math.nan, math.inf, -math.inf])


def whole(**change: Any) -> Measurements:
    """Measurements with anything in them, unchecked."""
    from likeness.records import Recogniser, SampleScore
    second = Recogniser.model_construct(backend="b", bank=DIGEST, threshold=change.get("second_threshold", 0.45), ceiling=0.1, floor=0.6)
    score = SampleScore.model_construct(**(GOOD | {k: v for k, v in change.items() if k in GOOD}), findings=(), slots_right=0, slots_asked=0)
    return Measurements.model_construct(backend="a", bank=DIGEST, threshold=change.get("threshold", 0.45), ceiling=0.1, floor=0.6, usable_portraits=8, diversity=0.2,
                                        scores=(score,), apart=((),), bare=(), base=BASE, second=second)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["identity_distance", "position", "second_distance", "second_position", "threshold", "second_threshold"]), BROKEN, min_size=1))
def test_a_sample_with_a_number_missing_is_nobody_and_of_nobody_in_particular_it_may_be_anybody(change: dict[str, Any]) -> None:
    if any(change.get(key, 0.0) is None for key in ("threshold", "second_threshold")):
        return                                                       # of these a record always has some number
    assert gate.is_person(whole().scores[0], whole(), POLICY)
    measured = whole(**change)
    assert not gate.is_person(measured.scores[0], measured, POLICY)
    if {"identity_distance", "second_distance", "threshold", "second_threshold"} & change.keys():
        assert gate.is_drifted(measured.scores[0], measured, POLICY)


@settings(max_examples=30, deadline=None)
@given(BROKEN)
def test_a_sample_whose_nearness_to_the_photos_is_no_number_is_a_copy(value: float | None) -> None:
    assert not gate.is_copy(whole().scores[0], POLICY)
    assert gate.is_copy(whole(nearest_training=value).scores[0], POLICY)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.sampled_from([math.nan, math.inf]))
def test_distances_that_are_no_numbers_never_make_a_set_more_varied(places: list[float], pairs: set[tuple[int, int]], value: float) -> None:
    known = [[abs(a - b) for b in places[:i]] for i, a in enumerate(places)]
    unknown = [[value if {(i, j), (j, i)} & pairs else known[i][j] for j in range(i)] for i in range(6)]
    found, true = gate.spread(unknown, range(6)), gate.spread(known, range(6))
    assert found is None or (true is not None and found <= true)
