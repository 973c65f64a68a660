"""How often each threshold of a policy errs, from photos of people of whom the truth is known, without any training: `likeness gate calibrate`.

Unseen photos of a person stand for the samples of a perfect adapter; those of others, copies of the portraits, planted defects, one picture over and over, and
answers that ignore the prompt for what must be refused. What an honest adapter really draws is worse than photos: only trained adapters can say how often it is refused.

Rates of samples are counted. Rates of sets are computed: a set is as many samples as the battery draws, drawn with replacement from what was found of one person, so the chance that it
passes is that of a sum of independent draws (`likeness.gate.chances`); only the spread of a set has no such formula and is drawn, seeded, DRAWN times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from likeness import gate
from likeness.calibration import Calibration, Point, Rate, Tally, at_least, curve_of, equal_of
from likeness.gate import GATED, GatePolicy
from likeness.records import BaseScores, FindingCode, Measurements, SampleScore
from likeness.settings import Battery
from models.faces.face import Picture
from models.maquette.companions import Bank
from models.quality import measure, unsafe
from models.quality.albums import Fold, Looked
from models.quality.edits import EDITS, mirrored
from models.quality.planting import CHECKERS, NAMES

DRAWN = 50                # sets of each person whose spread is measured
SEED = 7
FACELESS = ("second face", "erased face")        # planted: what is no sample with one face
Scored = list[tuple[SampleScore, Measurements]]
BLANK = np.zeros((measure.APPEARANCE_SIDE_PX, measure.APPEARANCE_SIDE_PX, 3), np.float32)


@dataclass(frozen=True)
class Study:
    """Everything that rates are computed from. `limits` are where findings begin without anybody's portraits; `drift` pictures are drawn of the noun alone."""

    people: Sequence[Looked]
    policy: GatePolicy
    battery: Battery
    backend: str
    bank: Bank
    second_bank: Bank | None
    base_scores: Callable[[str], BaseScores | None]
    limits: Mapping[FindingCode, float]
    bare: int

    @property
    def plain(self) -> int:
        """How many samples of a set are asked to be the person."""
        return sum(prompt.category != gate.STYLISED for prompt, _ in self.battery.every())

    @property
    def whole(self) -> int:
        """How many samples a set has."""
        return len(self.battery.every())

    def references(self, person: Looked, fold: Fold) -> measure.References:
        """What the samples of this person are held against, as in `tasks.judging`."""
        album = person.album
        second = None if album.second is None or self.second_bank is None else measure.Identity(
            self.second_bank.backend, self.second_bank.digest, album.second[fold.witnesses], album.second[fold.own], self.second_bank.embeddings)
        return measure.References(measure.Identity(self.backend, self.bank.digest, album.vectors[fold.witnesses], album.vectors[fold.own], self.bank.embeddings),
                                  np.stack([measure.thumbnail(album.crops[i]) for i in fold.own]), second=second)

    @cached_property
    def _referred(self) -> list[list[measure.References]]:
        return [[self.references(person, fold) for fold in person.folds] for person in self.people]

    @cached_property
    def own(self) -> list[Scored]:
        """Of each person, their unseen photos, judged as themselves."""
        return [[pair for fold, known in zip(person.folds, self._referred[t], strict=True) for pair in _scored([person.seen[i] for i in fold.unseen], known)]
                for t, person in enumerate(self.people)]

    @cached_property
    def others(self) -> dict[tuple[int, int], Scored]:
        """Photos of person o of the same class noun, judged as person t, by (t, o)."""
        return {(t, o): [pair for known in self._referred[t] for pair in _scored(other.seen, known)] for t, person in enumerate(self.people)
                for o, other in enumerate(self.people) if o != t and other.album.noun == person.album.noun}

    @cached_property
    def strangers(self) -> list[Scored]:
        """The bank's people judged as each person: their vectors alone are known."""
        seconds: Sequence[Any] = [None] * len(self.bank.embeddings) if self.second_bank is None else list(self.second_bank.embeddings)
        seen = [measure.Seen("0" * 64, "plain", 1, vector, BLANK, second=second) for vector, second in zip(self.bank.embeddings, seconds, strict=True)]
        return [[pair for known in self._referred[t] for start in range(0, len(seen), 25) for pair in _scored(seen[start:start + 25], known)] for t in range(len(self.people))]


def _scored(seen: Sequence[measure.Seen], known: measure.References) -> Scored:
    measured = measure.measure(seen, known)
    return [(score, measured) for score in measured.scores]


def calibrate(study: Study) -> tuple[Calibration, ...]:
    """A calibration of every threshold of the policy that decides something."""
    return (*_of_samples(study), *_of_identity_sets(study), *_of_copies(study), *_of_findings(study), *_of_defect_sets(study), *_of_prompts(study), _of_spread(study), _of_drift(study),
            Calibration(threshold="min_samples", value=float(study.policy.min_samples), data="", unmeasured="says how many samples decide anything, and judges none"),
            Calibration(threshold="few_portraits", value=float(study.policy.few_portraits), data="",
                        unmeasured="it and few_widening act on sets of fewer portraits only, which intake refuses unless intake.min_photos is lowered"))


# -- identity

def _of_samples(study: Study) -> list[Calibration]:
    policy = study.policy

    def row(threshold: str, value: float, values: Sequence[float], rule: Callable[[float], GatePolicy], data: str) -> Calibration:
        known = _Known(rule(value), study.own, study.others)
        curve = curve_of(values, lambda v: known.accept(rule(v)), lambda v: known.refuse(rule(v)))
        return _row(threshold, value, data, known.accepted, known.refused, curve, parts={"people of the bank": Rate.of([(_count(s, rule(value)), len(s)) for s in study.strangers])})

    whose = "let through: photos of others of the class noun; refused: unseen photos of the subject"
    rows = [
        row("max_distance", policy.max_distance, np.arange(0.3, 0.701, 0.01).tolist(),
            lambda v: policy.model_copy(update={"max_distance": v, "min_position": 0.0, "few_widening": 0.0}),
            f"{whose}; the distance alone, with the {measure.FALSE_ACCEPT_RATE:.0%} quantile of the bank, whichever is smaller"),
        row("min_position", policy.min_position, np.arange(0.0, 1.001, 0.025).tolist(), lambda v: policy.model_copy(update={"min_position": v}),
            f"{whose}; the whole rule for one sample"),
    ]
    if study.second_bank is None:
        return [*rows, Calibration(threshold="second_identity", value=None, data="", unmeasured="no second recogniser votes (backends.second_identity)")]
    second = _Known(policy, [[_as_second(pair) for pair in s] for s in study.own], {key: [_as_second(pair) for pair in s] for key, s in study.others.items()})
    return [*rows, _row("second_identity", None, f"{whose}; the second recogniser's vote alone", second.accepted, second.refused)]


@dataclass(frozen=True)
class _Known:
    """Who is recognised as whom under a policy."""

    policy: GatePolicy
    own: list[Scored]
    others: dict[tuple[int, int], Scored]

    @property
    def refused(self) -> list[Tally]:
        return [(len(s) - _count(s, self.policy), len(s)) for s in self.own]

    @property
    def accepted(self) -> tuple[list[Tally], list[Tally]]:
        """By who is asked for, and by who is on the photo."""
        return _by_each({key: (_count(s, self.policy), len(s)) for key, s in self.others.items()}, len(self.own))

    def refuse(self, policy: GatePolicy) -> float:
        return _share(_Known(policy, self.own, self.others).refused)

    def accept(self, policy: GatePolicy) -> float:
        return _share(_Known(policy, self.own, self.others).accepted[0])


def _by_each(found: Mapping[tuple[int, int], Tally], people: int) -> tuple[list[Tally], list[Tally]]:
    """Tallies of pairs, summed by the one of the pair and by the other."""
    first, second = ([(float(sum(e for e, _ in t)), float(sum(n for _, n in t))) for person in range(people) if (t := [v for key, v in found.items() if key[side] == person])]
                     for side in (0, 1))
    return first, second


def _count(scored: Scored, policy: GatePolicy) -> int:
    return sum(gate.is_person(score, measured, policy) for score, measured in scored)


def _share(tallies: Sequence[Tally]) -> float:
    return sum(e for e, _ in tallies) / max(1e-12, sum(n for _, n in tallies))


def _as_second(pair: tuple[SampleScore, Measurements]) -> tuple[SampleScore, Measurements]:
    """The second recogniser's opinion in the place of the first's."""
    score, measured = pair
    assert measured.second is not None
    return (score.model_copy(update={"identity_distance": score.second_distance, "position": score.second_position}),
            measured.model_copy(update={"threshold": measured.second.threshold, "second": None}))


def _of_identity_sets(study: Study) -> list[Calibration]:
    policy, n = study.policy, study.plain
    mine = [_count(s, policy) / len(s) for s in study.own]
    theirs = {key: _count(s, policy) / len(s) for key, s in study.others.items()}

    def accepted(v: float) -> tuple[list[Tally], list[Tally]]:
        return _by_each({key: (at_least([p] * n, v), 1) for key, p in theirs.items()}, len(study.people))

    return [_set_row("min_identity_share", policy.min_identity_share, n, accepted, lambda v: [(1 - at_least([p] * n, v), 1) for p in mine],
                     f"sets of {n}: let through: of one other person of the class noun; refused: of the subject's own unseen photos")]


def _set_row(threshold: str, value: float, n: int, accepted: Callable[[float], tuple[list[Tally], ...]], refused: Callable[[float], list[Tally]], data: str) -> Calibration:
    """A row about a share of the samples of a set: the curve has every share that n samples can have."""
    curve = curve_of([k / n for k in range(n + 1)], lambda v: _share(accepted(v)[0]), lambda v: _share(refused(v)))
    return _row(threshold, value, data, accepted(value), refused(value), curve)


def _row(threshold: str, value: float | None, data: str, accepted: tuple[Sequence[Tally], ...], refused: Sequence[Tally], curve: tuple[Point, ...] = (),
         parts: Mapping[str, Rate] | None = None) -> Calibration:
    """A row with both its rates; where there was nothing to ask about it says so."""
    if not all(sum(n for _, n in tally) for tally in (*accepted, refused)):
        return Calibration(threshold=threshold, value=value, data="", unmeasured="among these people there is nothing to ask it about")
    return Calibration(threshold=threshold, value=value, data=data, false_accept=Rate.of(*accepted), false_refusal=Rate.of(refused), curve=curve, equal=equal_of(curve),
                       parts=dict(parts or {}))


# -- copies

def _of_copies(study: Study) -> list[Calibration]:
    policy, n = study.policy, study.whole
    fresh = [[s.nearest_training for s, _ in scored if s.nearest_training is not None] for scored in study.own]
    copied = {name: [_nearest_of_copies(person, edit) for person in study.people] for name, edit in {**EDITS, "mirrored": mirrored}.items()}
    slight = [[d for distances in copied.values() for d in distances[t]] for t in range(len(study.people))]

    def missed(distances: Sequence[Sequence[float]], v: float) -> list[Tally]:
        return [(sum(d >= v for d in one), len(one)) for one in distances]

    def taken(v: float) -> list[Tally]:
        return [(sum(d < v for d in one), len(one)) for one in fresh]

    curve = curve_of(np.arange(0.0, 0.1501, 0.005).tolist(), lambda v: _share(missed(slight, v)), lambda v: _share(taken(v)))
    value = policy.min_copy_distance
    one = _row("min_copy_distance", value, f"let through: training portraits, slightly edited in {len(copied)} ways, mirrored among them; refused: unseen photos of the subject",
               (missed(slight, value),), taken(value), curve, parts={name: Rate.of(missed(d, value)) for name, d in copied.items()})
    catch = [1 - _share([t]) for t in missed(slight, value)]
    alarm = [_share([t]) for t in taken(value)]
    half = n // 2
    return [one, _set_row("max_copy_share", policy.max_copy_share, n,
                          lambda v: ([(1 - _more([c] * half + [a] * (n - half), v), 1) for c, a in zip(catch, alarm, strict=True)],), lambda v: [(_more([a] * n, v), 1) for a in alarm],
                          f"sets of {n}: let through: half of them slightly edited copies; refused: unseen photos of the subject")]


def _nearest_of_copies(person: Looked, edit: Callable[[Picture, float], Picture]) -> list[float]:
    """Of each photo, in the fold after the one that has it aside, the distance of an edited copy to the nearest portrait; strengths go evenly from 0 to 1."""
    distances, count = [], len(person.album.crops)
    for i, crop in enumerate(person.album.crops):
        fold = person.folds[(i + 1) % len(person.folds)]
        found = measure.nearest(measure.thumbnail(edit(crop, i / max(1, count - 1))), (measure.thumbnail(person.album.crops[j]) for j in fold.own))
        assert found is not None                             # a fold keeps some
        distances.append(found)
    return distances


def _more(probabilities: Sequence[float], share: float) -> float:
    """The chance that more than this share of the events come about."""
    return at_least(probabilities, (math.floor(share * len(probabilities) + 1e-9) + 1) / len(probabilities))


# -- faces and findings

def _of_findings(study: Study) -> list[Calibration]:
    rows = []
    for plant, code in CHECKERS.items():
        missed = [(sum(not NAMES[plant] & s.codes for s in person.spoilt[plant]), len(person.spoilt[plant])) for person in study.people]
        alarms = [(sum(any(f.code in NAMES[plant] for f in s.findings) for s in person.seen), len(person.seen)) for person in study.people]
        counts = "counts against an adapter" if code in GATED else "reported only"
        rows.append(_row(f"finding {code}", study.limits.get(code), f"let through: planted ({plant}); refused: unseen photos of the subject; {counts}", (missed,), alarms))
    called = [sum(any(f.code == "unsafe" for f in s.findings) for s in person.seen) for person in study.people]
    photos = sum(len(person.seen) for person in study.people)
    rows.append(Calibration(threshold="finding unsafe", value=unsafe.LIMIT, data="",
                            unmeasured=f"what it lets through nobody here can show it; of {photos} unseen photos it calls {sum(called)} unsafe, of {sum(map(bool, called))} people"))
    return rows


def _of_defect_sets(study: Study) -> list[Calibration]:
    policy, n = study.policy, study.whole
    half = n // 2
    gated = [plant for plant, code in CHECKERS.items() if code in GATED]
    caught = [_mean([bool(GATED & s.codes) for plant in gated for s in person.spoilt[plant]]) for person in study.people]
    alarm = [_mean([any(f.code in GATED for f in s.findings) for s in person.seen]) for person in study.people]
    hidden = [_mean([s.faces == 1 for plant in FACELESS for s in person.spoilt[plant]]) for person in study.people]
    shown = [_mean([s.faces == 1 for s in person.seen]) for person in study.people]
    return [
        _set_row("min_face_share", policy.min_face_share, n, lambda v: ([(at_least([h] * half + [s] * (n - half), v), 1) for h, s in zip(hidden, shown, strict=True)],),
                 lambda v: [(1 - at_least([s] * n, v), 1) for s in shown], f"sets of {n}: let through: half of them with a second face or a face smeared away; refused: unseen photos"),
        _set_row("max_defect_share", policy.max_defect_share, n, lambda v: ([(1 - _more([c] * half + [a] * (n - half), v), 1) for c, a in zip(caught, alarm, strict=True)],),
                 lambda v: [(_more([a] * n, v), 1) for a in alarm], f"sets of {n}: let through: half of them with a planted defect of a gated type; refused: unseen photos"),
    ]


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


# -- against the base alone

def _of_prompts(study: Study) -> list[Calibration]:
    """Both thresholds of editability: what the base alone draws must be let through, photos that answer no prompt must not."""
    policy = study.policy
    wanted = [(prompt.category, slot, value) for prompt, _ in study.battery.every() for slot, value in prompt.slots.items()]
    asked = {category: sum(c == category for c, _, _ in wanted) for category, _, _ in wanted}
    bases = {noun: study.base_scores(noun) for noun in {person.album.noun for person in study.people}}
    thresholds = {"min_editability_share": policy.min_editability_share, "editability_doubt": policy.editability_doubt}
    if not wanted or not all(b is not None and all(b.slots.get(c, (0, 0))[1] for c in asked) for b in bases.values()):
        why = "the battery asks for no details" if not wanted else "what the base alone follows of this battery was not measured"
        return [Calibration(threshold=name, value=value, data="", unmeasured=why) for name, value in thresholds.items()]
    known = {noun: b for noun, b in bases.items() if b is not None}
    deaf = [[_mean([a.get(slot, ("", 0.0))[0] == value for a in person.answers]) for _, slot, value in wanted] for person in study.people]

    def fewest(noun: str, changed: GatePolicy) -> int:
        return gate.fewest_followed(asked, known[noun], changed) or 0

    def accepted(changed: GatePolicy) -> list[Tally]:
        return [(at_least(chances, fewest(person.album.noun, changed) / len(wanted)), 1) for person, chances in zip(study.people, deaf, strict=True)]

    def refused(changed: GatePolicy, noun: str, often: Mapping[str, float]) -> float:
        """Of sets that the base alone draws, were it to follow the details of each category so often."""
        return 1 - at_least([often[category] for category, _, _ in wanted], fewest(noun, changed) / len(wanted))

    smoothed = {noun: {c: (seen + 0.5) / (of + 1) for c, (seen, of) in b.slots.items()} for noun, b in known.items()}      # as `fewest_followed` has them

    def refusals(changed: GatePolicy) -> float:
        return float(np.mean([refused(changed, noun, smoothed[noun]) for noun in known]))

    def rate(changed: GatePolicy) -> Rate:
        """Its interval is what the base's counts leave open: frequencies from Beta(seen + 1/2, missed + 1/2), Jeffreys' posterior, drawn 500 times."""
        rng, p = np.random.default_rng(SEED), refusals(changed)
        draws = [float(np.mean([refused(changed, noun, {c: float(rng.beta(seen + 0.5, of - seen + 0.5)) for c, (seen, of) in b.slots.items()}) for noun, b in known.items()]))
                 for _ in range(500)]
        low, high = np.quantile(draws, (0.025, 0.975))
        return Rate(rate=round(p, 5), low=round(min(p, float(low)), 5), high=round(max(p, float(high)), 5), n=sum(of for b in known.values() for _, of in b.slots.values()), people=len(known))

    names = ", ".join(f"{fewest(noun, policy)} of {len(wanted)} for a {noun}" for noun in sorted(known))
    rows = []
    for name, values in (("min_editability_share", np.arange(0.0, 1.001, 0.05).tolist()), ("editability_doubt", (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7))):
        def changed(v: float, name: str = name) -> GatePolicy:
            return policy.model_copy(update={name: v})

        curve = curve_of(values, lambda v, c=changed: _share(accepted(c(v))), lambda v, c=changed: refusals(c(v)))      # type: ignore[misc]
        rows.append(Calibration(threshold=name, value=thresholds[name], curve=curve, equal=equal_of(curve), false_accept=Rate.of(accepted(policy)), false_refusal=rate(policy),
                                data=f"sets of {study.whole}: let through: unseen photos in the place of answers to prompts; refused: what the base alone draws, from its counts "
                                     f"(people are class nouns there, n its details); details asked for: {names}"))
    return rows


def _of_spread(study: Study) -> Calibration:
    policy, n, rng = study.policy, study.plain, np.random.default_rng(SEED)
    name, value = "min_diversity_share", policy.min_diversity_share
    bases = {noun: study.base_scores(noun) for noun in {person.album.noun for person in study.people}}
    if not all(b is not None and b.spread for b in bases.values()):
        return Calibration(threshold=name, value=value, data="", unmeasured="how different the samples of the base alone are was not measured")
    fewest = max(gate.VARIED, math.ceil(policy.min_identity_share * n - 1e-9))
    varied: list[list[float]] = []
    same: list[list[float]] = []
    for person, scored in zip(study.people, study.own, strict=True):
        base = bases[person.album.noun]
        assert base is not None and base.spread is not None
        known = {score.image for score, measured in scored if gate.is_person(score, measured, policy)}
        smalls = [measure.thumbnail(crop) for crop in person.album.crops]
        apart = measure.distances(smalls)
        recognised = [i for i, seen in enumerate(person.seen) if seen.image in known]
        varied.append([(gate.spread(apart, rng.choice(recognised, fewest, replace=False).tolist()) or 0.0) / base.spread for _ in range(DRAWN) if len(recognised) >= fewest])
        edits = list(EDITS.values())
        repeated = [[measure.thumbnail(edits[k % len(edits)](crop, float(rng.random()))) for k in range(n)] for crop in person.album.crops]
        same.append([(gate.spread(measure.distances(one), range(n)) or 0.0) / base.spread for one in repeated])

    def passed(v: float) -> list[Tally]:
        return [(sum(s >= v for s in one), len(one)) for one in same]

    def refused(v: float) -> list[Tally]:
        return [(sum(s < v for s in one), len(one)) for one in varied]

    curve = curve_of(np.arange(0.0, 1.501, 0.05).tolist(), lambda v: _share(passed(v)), lambda v: _share(refused(v)))
    return _row(name, value, f"sets of {n}: let through: one photo over and over, slightly edited; refused: {fewest} recognised photos of the subject, as few as may be recognised "
                             f"of a set, drawn {DRAWN} times", (passed(value),), refused(value), curve)


def _of_drift(study: Study) -> Calibration:
    policy, n = study.policy, study.bare
    if policy.max_drift_share >= 1:
        return Calibration(threshold="max_drift_share", value=policy.max_drift_share, data="", unmeasured="a share of 1 asks nothing; set one that asks, and calibrate again")
    drifted = [_mean([gate.is_drifted(s, m, policy) for s, m in scored]) for scored in study.own]
    strange = {key: _mean([gate.is_drifted(s, m, policy) for s, m in scored]) for key, scored in study.others.items()}

    def refused(v: float) -> list[Tally]:
        return _by_each({key: (_more([p] * n, v), 1) for key, p in strange.items()}, len(study.people))[0]

    return _set_row("max_drift_share", policy.max_drift_share, n, lambda v: ([(1 - _more([d] * n, v), 1) for d in drifted],), refused,
                    f"{n} pictures of nobody in particular: let through: unseen photos of the subject; refused: photos of one other person of the class noun")
