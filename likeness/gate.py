"""The gate: measurements in, Verdict out. Pure; a score that improves never turns accepted into refused.

Identity is judged by position between two references of the subject: the *floor* is how far impostors are (the shipped bank of rendered
people), the *ceiling* how far the subject's own photos are from each other (leave-one-out). Both are distances of one recogniser, so a
position means the same thing for every subject: 0 is an impostor, 1 is themselves.

How often each threshold errs stands beside it in `likeness.calibration`. None was chosen on a demo subject.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import Field

from likeness.digest import Digest
from likeness.records import BaseScores, Finding, FindingCode, Measurements, Reason, Record, SampleScore, Verdict

STYLISED = "style"             # category of prompts whose samples need not be recognisable
VARIED = 4                     # samples that must differ from each other: what an owner gets who asks for a few

# Findings that count against an Adapter: those whose planted defects were found and clean pictures left alone, each at least nine times in ten,
# on renders and on the maquette's own samples (models/quality/planted.json, `make bench-gate`; a test compares). The others are reported.
# `unmeasured` is always among them: what could not be looked at does not pass. `unsafe` is, though only its false alarms were measured: the harm would be somebody's.
GATED: frozenset[FindingCode] = frozenset({"no_face", "extra_face", "cropped_face", "grid", "blur", "unsafe", "unmeasured"})


class GatePolicy(Record):
    """What an Adapter must reach. Data with a digest; a Verdict names the policy it was made under."""

    max_distance: float = Field(0.52, gt=0, description="identity distance (dlib, Euclidean, sample to centroid of the held-out portraits) below which a "
                                                        "sample is this person, whatever the subject's own spread")
    min_position: float = Field(0.45, ge=0, le=1, description="position between floor and ceiling that a sample must reach")
    min_identity_share: float = Field(0.4, ge=0, le=1, description="share of unstylised samples with one face that must be this person")
    min_face_share: float = Field(0.75, ge=0, le=1, description="share of samples that must show exactly one face")
    max_copy_share: float = Field(0.1, ge=0, le=1, description="share of samples that may be copies of a training crop")
    min_copy_distance: float = Field(0.055, gt=0, description="appearance distance to the nearest training crop below which a sample is a copy of it")
    max_defect_share: float = Field(0.25, ge=0, le=1, description="share of samples that may have a defect of a gated type; the complement of "
                                                                  "min_face_share, whose failures are among them")
    min_editability_share: float = Field(0.8, ge=0, le=1, description="an Adapter must not be shown to follow prompts less often than this share of what its base "
                                                                     "alone does; 0 asks nothing")
    editability_doubt: float = Field(0.05, gt=0, lt=1, description="it is shown where chance would give so few followed details, at that share, less often than this")
    min_diversity_share: float = Field(0.3, ge=0, le=1, description="four samples that are this person must differ, the two most alike of them, by this share of what "
                                                                   "four samples of the base alone do; 0 asks nothing")
    max_drift_share: float = Field(1.0, ge=0, le=1, description="share of samples of the class noun alone that may be recognised as this person; 1 asks nothing: it "
                                                               "is reported only, because the shipped recipes drift (docs/gate.md)")
    max_delivered: int = Field(8, ge=1, description="samples handed to the owner at most")
    max_more_seeds: int = Field(2, ge=0, le=64, exclude_if=lambda seeds: seeds == 2,      # so policies from before there were any keep their digest
                                description="where fewer samples of an accepted Adapter may be delivered, so many further seeds of each prompt are drawn at most, as "
                                            "many as its pass rate asks for; they decide nothing, they are only delivered. 0 draws none")
    min_samples: int = Field(8, ge=1, description="fewer measured samples than this decide nothing")
    few_portraits: int = Field(4, ge=1, description="below this many usable portraits the identity band widens")
    few_widening: float = Field(0.1, ge=0, le=0.5, description="how much min_position rises when portraits are few: less evidence needs a clearer result")
    calibration: Digest | None = Field(None, description="digest of the calibrations that these thresholds were chosen by, as `likeness gate calibrate` prints it: a Verdict's "
                                                         "policy then names its evidence. None: whichever were measured of these thresholds (docs/gate.md)")

    @property
    def thresholds(self) -> Digest:
        """Digest of what decides: the policy, whatever calibrations it names."""
        return self.model_copy(update={"calibration": None}).digest


def position(distance: float, *, floor: float, ceiling: float) -> float | None:
    """Where `distance` lies between the impostor floor (0) and the subject's own ceiling (1), clipped; None if the two do not differ.

    All three are distances in one metric, smaller is nearer, so floor > ceiling for a recogniser that works.
    """
    if not all(map(math.isfinite, (distance, floor, ceiling))) or floor - ceiling < 1e-6:
        return None
    return min(1.0, max(0.0, (floor - distance) / (floor - ceiling)))


def needed_position(measured: Measurements, policy: GatePolicy) -> float:
    """The position that a sample must reach: more where portraits are few."""
    return policy.min_position + (policy.few_widening if _few(measured, policy) else 0.0)


def _few(measured: Measurements, policy: GatePolicy) -> bool:
    return measured.usable_portraits < policy.few_portraits


def is_person(score: SampleScore, measured: Measurements, policy: GatePolicy) -> bool:
    """Whether one sample shows exactly one face, and it is the subject's; where a second recogniser votes, both must say so. Unmeasured never passes."""
    needed = needed_position(measured, policy)
    votes = [(score.identity_distance, score.position, measured.threshold)]
    if measured.second is not None:
        votes.append((score.second_distance, score.second_position, measured.second.threshold))
    return score.faces == 1 and all(_all_measured(distance, where, threshold) and distance <= min(policy.max_distance, threshold) and where >= needed     # type: ignore[operator]
                                    for distance, where, threshold in votes)


def _all_measured(*values: float | None) -> bool:
    """Whether each of these is a number. A comparison is no test of that: min(0.5, NaN) is 0.5."""
    return all(value is not None and math.isfinite(value) for value in values)


def is_copy(score: SampleScore, policy: GatePolicy) -> bool:
    """Whether one sample repeats a training crop. Unmeasured counts as a copy."""
    return score.nearest_training is None or not math.isfinite(score.nearest_training) or score.nearest_training < policy.min_copy_distance


def is_drifted(score: SampleScore, measured: Measurements, policy: GatePolicy) -> bool:
    """Whether one sample of the class noun alone shows the subject. One without exactly one face that could be measured counts as if it did."""
    numbers = [score.identity_distance, measured.threshold]
    if measured.second is not None:
        numbers += [score.second_distance, measured.second.threshold]
    return score.faces != 1 or not _all_measured(*numbers) or is_person(score, measured, policy)


def spread(apart: Sequence[Sequence[float]], chosen: Sequence[int], *, count: int = VARIED) -> float | None:
    """The largest distance d such that `count` of the chosen samples are at least d from each other; None if they are fewer.

    One more sample never makes it smaller, which a mean over all pairs would; one odd sample among many alike does not make it larger.
    Pairs are joined, the farthest first, until `count` samples are all joined with each other; a pair whose distance is no number never is.

    Args:
        apart: row i, distance of sample i to each before it.
        chosen: which samples.
    """
    pairs = sorted(((apart[max(i, j)][min(i, j)], i, j) for place, i in enumerate(chosen) for j in chosen[:place]
                    if math.isfinite(apart[max(i, j)][min(i, j)])), key=lambda pair: -pair[0])
    joined: dict[int, set[int]] = {i: set() for i in chosen}
    for distance, i, j in pairs:
        if _clique(joined[i] & joined[j], joined, count - 2):
            return distance
        joined[i].add(j)
        joined[j].add(i)
    return None


def _clique(among: set[int], joined: Mapping[int, set[int]], count: int) -> bool:
    """Whether `count` of these samples are all joined with each other."""
    if count <= 1:
        return len(among) >= count
    return any(_clique(among & joined[i], joined, count - 1) for i in among)


def fewest_followed(asked: Mapping[str, int], base: BaseScores, policy: GatePolicy) -> int | None:
    """How many of the details that the battery asks for, by category, must be seen at least; None if the base was not measured on one of the categories.

    Were each detail followed with `min_editability_share` of the base's own frequency in its category, (seen + 1/2) / (asked for + 1), then fewer than this would be
    seen with a chance of less than `editability_doubt`. Details of one sample count as if they were independent.
    """
    rates: list[float] = []                                      # of each detail
    for category, count in asked.items():
        seen, of = base.slots.get(category, (0, 0))
        if of == 0:
            return None
        rate = policy.min_editability_share * (seen + 0.5) / (of + 1)
        rates += [rate] * count
    so_far = 0.0
    for followed, chance in enumerate(chances(rates)):
        so_far += chance
        if so_far >= policy.editability_doubt:
            return followed
    return len(rates)                                            # rounding alone leads here


def chances(probabilities: Sequence[float]) -> list[float]:
    """The chance of 0, 1, ... events among independent ones with these probabilities."""
    found = [1.0]
    for p in probabilities:
        found = [here * (1 - p) + before * p for here, before in zip([*found, 0.0], [0.0, *found], strict=True)]
    return found


def is_defective(score: SampleScore) -> bool:
    """Whether one sample has a finding of a type that is gated."""
    return any(finding.code in GATED for finding in score.findings)


def is_showable(findings: Sequence[Finding]) -> bool:
    """Whether a picture may be shown to whoever opens a page: it was looked at, and nothing unsafe was found. What could not be looked at may not."""
    return not any(finding.code == "unsafe" or finding.of == "unsafe" for finding in findings)


def judge(measured: Measurements, policy: GatePolicy) -> Verdict:
    """Decide. Every objection is listed, the worst one names the verdict.

    Returns:
        `accepted` with the delivered samples, or `retry` (a different training may help), `needs_photos` (the photos themselves do not
        agree about who this is), `rejected` (nothing measurable).
    """
    scores = measured.scores
    plain = [s for s in scores if s.category != STYLISED]
    one_face = _share([s.faces == 1 for s in scores])
    identity = _share([is_person(s, measured, policy) for s in plain])
    copies = _share([is_copy(s, policy) for s in scores])
    defects = _share([is_defective(s) for s in scores])
    positions = [s.position for s in plain if s.faces == 1 and s.position is not None and math.isfinite(s.position)]
    few = (f"; with {measured.usable_portraits} usable portrait{'' if measured.usable_portraits == 1 else 's'} a sample must lie {needed_position(measured, policy):.0%} of the way from "
           f"strangers to the own photos, with {policy.few_portraits} and more {policy.min_position:.0%}") if _few(measured, policy) else ""
    objections: list[tuple[str, Reason]] = []
    if len(plain) < policy.min_samples:
        objections.append(("rejected", Reason(code="too_few_samples", value=float(len(plain)), needed=float(policy.min_samples),
                                              message=f"{len(plain)} samples could be judged, {policy.min_samples} are needed: sample more seeds")))
    if not _separated(measured):
        objections.append(("needs_photos", Reason(
            code="photos_disagree", value=measured.ceiling, needed=measured.floor,
            message="the portraits are as far from each other as from strangers, so nothing can be said about identity: "
                    "use photos of one person with the face large and sharp")))
    if not one_face >= policy.min_face_share:
        objections.append(("retry", Reason(code="faces", value=one_face, needed=policy.min_face_share,
                                           message=f"{one_face:.0%} of the samples show exactly one face, {policy.min_face_share:.0%} are needed")))
    if not identity >= policy.min_identity_share:
        objections.append(("retry", Reason(code="identity", value=identity, needed=policy.min_identity_share,
                                           message=f"{identity:.0%} of the samples are recognisably this person, {policy.min_identity_share:.0%} are needed{few}")))
    if not copies <= policy.max_copy_share:
        objections.append(("retry", Reason(code="copies", value=copies, needed=policy.max_copy_share,
                                           message=f"{copies:.0%} of the samples repeat a training photo, at most {policy.max_copy_share:.0%} may")))
    if not defects <= policy.max_defect_share:
        objections.append(("retry", Reason(code="defects", value=defects, needed=policy.max_defect_share,
                                           message=f"{defects:.0%} of the samples have a defect ({_counted(scores)}), at most {policy.max_defect_share:.0%} may")))
    followed, told = _followed(scores), _Compared.of(measured, policy)
    objections += [("retry", reason) for reason in told.objections(measured, policy, too_few=not identity >= policy.min_identity_share)]
    kinds = [kind for kind, _ in objections]
    kind = next((k for k in ("rejected", "needs_photos", "retry") if k in kinds), "accepted")
    delivered = _deliver(measured, policy) if kind == "accepted" else ()
    if kind == "accepted":
        objections.append((kind, Reason(code="accepted", value=identity, needed=policy.min_identity_share,
                                        message=f"{identity:.0%} of the samples are recognisably this person and {one_face:.0%} show exactly one face{few}")))
    return Verdict.model_validate(dict(
        kind=kind, reasons=tuple(r for _, r in objections),
        scores={"identity_share": identity, "identity_position": median(positions) if positions else None, "one_face_share": one_face, "copy_share": copies,
                "defect_share": defects, "editability": told.editability, "editability_needed": told.editability_needed,
                **{f"editability.{category}": right / asked for category, (right, asked) in followed.items()}, "diversity": measured.diversity,
                "spread": told.spread, "spread_needed": told.spread_needed, "drift_share": told.drift, "floor": measured.floor, "ceiling": measured.ceiling,
                "threshold": min(policy.max_distance, measured.threshold)}
        | ({} if measured.second is None else {"second_floor": measured.second.floor, "second_ceiling": measured.second.ceiling,
                                               "second_threshold": min(policy.max_distance, measured.second.threshold)}),
        measured=measured.digest, policy=policy.digest, delivered=delivered))


@dataclass(frozen=True)
class _Compared:
    """What is held against the base alone. None: not asked for, or not measured."""

    editability: float | None                  # share of the details asked for that are seen
    editability_needed: float | None
    spread: float | None
    spread_needed: float | None
    drift: float | None

    @classmethod
    def of(cls, measured: Measurements, policy: GatePolicy) -> _Compared:
        counts, base = _followed(measured.scores), measured.base
        asked = sum(n for _, n in counts.values())
        fewest = fewest_followed({category: n for category, (_, n) in counts.items()}, base, policy) if asked and base is not None else None
        persons = [i for i, s in enumerate(measured.scores) if s.category != STYLISED and is_person(s, measured, policy)]
        return cls(editability=sum(right for right, _ in counts.values()) / asked if asked else None, editability_needed=None if fewest is None else fewest / asked,
                   spread=spread(measured.apart, persons) if measured.apart else None,
                   spread_needed=None if base is None or base.spread is None else policy.min_diversity_share * base.spread,
                   drift=_share([is_drifted(s, measured, policy) for s in measured.bare]) if measured.bare else None)

    def objections(self, measured: Measurements, policy: GatePolicy, *, too_few: bool) -> list[Reason]:
        """What is wrong. With `too_few` samples of the person, which is objected to already, nothing is asked of the differences between them unless there are enough."""
        found = []
        if policy.min_editability_share > 0 and self.editability is not None and (self.editability_needed is None or self.editability < self.editability_needed):
            found.append(Reason(code="editability", value=self.editability, needed=self.editability_needed, message=(
                f"{self.editability:.0%} of the details that prompts ask for are seen" + (", and what the base alone does was not measured" if self.editability_needed is None
                else f", at least {self.editability_needed:.0%} would be if prompts were followed {policy.min_editability_share:.0%} as often as by the base alone "
                     f"({measured.base.editability if measured.base else 0:.0%})"))))
        if policy.min_diversity_share > 0 and not (self.spread is None and too_few) and not _at_least(self.spread, self.spread_needed):
            found.append(Reason(code="diversity", value=self.spread, needed=self.spread_needed, message=(
                "how different the samples are was not measured, or not of the base alone" if self.spread is None or self.spread_needed is None else
                f"any {VARIED} samples of this person have two that differ by {self.spread:.3f} or less, {self.spread_needed:.3f} is needed, which is "
                f"{policy.min_diversity_share:.0%} of what {VARIED} samples of the base alone do")))
        if policy.max_drift_share < 1 and not (self.drift is not None and self.drift <= policy.max_drift_share):
            found.append(Reason(code="drift", value=self.drift, needed=policy.max_drift_share, message=(
                "no samples of the class noun alone were measured" if self.drift is None else
                f"{self.drift:.0%} of the samples of nobody in particular show this person or could not be measured, at most {policy.max_drift_share:.0%} may")))
        return found


def _at_least(value: float | None, needed: float | None) -> bool:
    return _all_measured(value, needed) and value >= needed          # type: ignore[operator]


def _followed(scores: Sequence[SampleScore]) -> dict[str, tuple[int, int]]:
    """By category of prompts: how many of the details asked for are seen, and how many are asked for; categories that ask for none are left out."""
    counts: dict[str, tuple[int, int]] = {}
    for s in scores:
        if s.slots_asked:
            right, asked = counts.get(s.category, (0, 0))
            counts[s.category] = right + s.slots_right, asked + s.slots_asked
    return counts


def _separated(measured: Measurements) -> bool:
    """Whether every recogniser that votes tells the subject's portraits from strangers."""
    return all(math.isfinite(r.ceiling) and math.isfinite(r.floor) and r.floor - r.ceiling >= 0.05 for r in (measured, measured.second) if r is not None)


def _counted(scores: Sequence[SampleScore]) -> str:
    """Which gated findings, and in how many samples: "blur 3, grid 1"."""
    samples = Counter(code for s in scores for code in {f.code for f in s.findings} & GATED)
    return ", ".join(f"{code.replace('_', ' ')} {n}" for code, n in sorted(samples.items(), key=lambda item: (-item[1], item[0])))


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def more_seeds(verdict: Verdict, measured: Measurements, policy: GatePolicy, *, prompts: int) -> int:
    """How many further seeds of each prompt are to be drawn so that an accepted Adapter has `max_delivered` samples to deliver; 0 where it has, or is not accepted.

    Of the samples that decided a share was fit to be delivered; so many more are drawn as would yield what is missing at that rate, `max_more_seeds` at most. What is drawn
    then never decides: an Adapter that may try again until it passes passes.

    Args:
        prompts: of the battery.
    """
    missing = policy.max_delivered - len(verdict.delivered)
    if verdict.kind != "accepted" or missing <= 0 or not measured.scores:
        return 0
    rate = (len(verdict.delivered) or 0.5) / len(measured.scores)
    return min(policy.max_more_seeds, math.ceil(missing / (rate * prompts)))


def _deliver(measured: Measurements, policy: GatePolicy) -> tuple[str, ...]:
    """Samples that pass, without findings where there are any such, at most `max_delivered`: the most alike first, then each time the one
    farthest in appearance from all chosen so far, so that a few show what the Adapter can do. Equals by likeness, then by digest. Those drawn besides may be among them.
    """
    scores = (*measured.scores, *measured.more)
    good = [i for i, s in enumerate(scores) if is_person(s, measured, policy) and not is_copy(s, policy) and not is_defective(s)]
    some_clean = any(not scores[i].findings for i in good if i < len(measured.scores))        # asked of those that decided: more of them never makes fewer delivered
    clean = [i for i in good if not scores[i].findings] if some_clean else good
    left = list({scores[i].image: i for i in reversed(clean)}.values())          # one picture once
    chosen: list[int] = []
    while left and len(chosen) < policy.max_delivered:
        left.sort(key=lambda i: (-min((_apart(measured, i, j) for j in chosen), default=0.0), -(scores[i].position or 0.0), scores[i].image))
        chosen.append(left.pop(0))
    return tuple(scores[i].image for i in chosen)


def _apart(measured: Measurements, i: int, j: int) -> float:
    return measured.apart[max(i, j)][min(i, j)] if measured.apart else 0.0
