"""The gate: measurements in, Verdict out. Pure; a score that improves never turns accepted into refused.

Identity is judged by position between two references of the subject: the *floor* is how far impostors are (the shipped bank of rendered
people), the *ceiling* how far the subject's own photos are from each other (leave-one-out). Both are distances of one recogniser, so a
position means the same thing for every subject: 0 is an impostor, 1 is themselves.

Thresholds belong to a calibration (`Calibration`): data, date, error rates. None was chosen on a demo subject.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from pydantic import Field

from likeness.records import FindingCode, Measurements, Reason, Record, SampleScore, Verdict

STYLISED = "style"             # category of prompts whose samples need not be recognisable

# Findings that count against an Adapter: those whose planted defects were found and clean pictures left alone, each at least nine times in ten,
# on renders and on the maquette's own samples (models/quality/planted.json, `make bench-gate`; a test compares). The others are reported.
# `unmeasured` is always among them: what could not be looked at does not pass.
GATED: frozenset[FindingCode] = frozenset({"no_face", "extra_face", "cropped_face", "grid", "blur", "unmeasured"})


class Calibration(Record):
    """Where a threshold comes from."""

    data: str
    date: str
    false_accept_rate: float = Field(ge=0, le=1)
    false_refusal_rate: float = Field(ge=0, le=1)


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
    max_delivered: int = Field(8, ge=1, description="samples handed to the owner at most")
    min_samples: int = Field(8, ge=1, description="fewer measured samples than this decide nothing")
    few_portraits: int = Field(4, ge=1, description="below this many usable portraits the identity band widens")
    few_widening: float = Field(0.1, ge=0, le=0.5, description="how much min_position rises when portraits are few: less evidence needs a clearer result")
    calibration: Calibration | None = None


def position(distance: float, *, floor: float, ceiling: float) -> float | None:
    """Where `distance` lies between the impostor floor (0) and the subject's own ceiling (1), clipped; None if the two do not differ.

    All three are distances in one metric, smaller is nearer, so floor > ceiling for a recogniser that works.
    """
    if not all(map(math.isfinite, (distance, floor, ceiling))) or floor - ceiling < 1e-6:
        return None
    return min(1.0, max(0.0, (floor - distance) / (floor - ceiling)))


def is_person(score: SampleScore, measured: Measurements, policy: GatePolicy) -> bool:
    """Whether one sample shows exactly one face, and it is the subject's. Unmeasured never passes."""
    if score.faces != 1 or score.identity_distance is None or score.position is None:
        return False
    if not math.isfinite(score.identity_distance) or not math.isfinite(score.position):
        return False
    needed = policy.min_position + (policy.few_widening if measured.usable_portraits < policy.few_portraits else 0.0)
    return score.identity_distance <= min(policy.max_distance, measured.threshold) and score.position >= needed


def is_copy(score: SampleScore, policy: GatePolicy) -> bool:
    """Whether one sample repeats a training crop. Unmeasured counts as a copy."""
    return score.nearest_training is None or not score.nearest_training >= policy.min_copy_distance


def is_defective(score: SampleScore) -> bool:
    """Whether one sample has a finding of a type that is gated."""
    return any(finding.code in GATED for finding in score.findings)


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
                                           message=f"{identity:.0%} of the samples are recognisably this person, {policy.min_identity_share:.0%} are needed")))
    if not copies <= policy.max_copy_share:
        objections.append(("retry", Reason(code="copies", value=copies, needed=policy.max_copy_share,
                                           message=f"{copies:.0%} of the samples repeat a training photo, at most {policy.max_copy_share:.0%} may")))
    if not defects <= policy.max_defect_share:
        objections.append(("retry", Reason(code="defects", value=defects, needed=policy.max_defect_share,
                                           message=f"{defects:.0%} of the samples have a defect ({_counted(scores)}), at most {policy.max_defect_share:.0%} may")))
    kinds = [kind for kind, _ in objections]
    kind = next((k for k in ("rejected", "needs_photos", "retry") if k in kinds), "accepted")
    delivered = _deliver(measured, policy) if kind == "accepted" else ()
    if kind == "accepted":
        objections.append((kind, Reason(code="accepted", value=identity, needed=policy.min_identity_share,
                                        message=f"{identity:.0%} of the samples are recognisably this person and {one_face:.0%} show exactly one face")))
    return Verdict.model_validate(dict(
        kind=kind, reasons=tuple(r for _, r in objections),
        scores={"identity_share": identity, "identity_position": median(positions) if positions else None, "one_face_share": one_face,
                "copy_share": copies, "defect_share": defects, "editability": _editability(scores), "diversity": measured.diversity, "floor": measured.floor, "ceiling": measured.ceiling,
                "threshold": min(policy.max_distance, measured.threshold)},
        measured=measured.digest, policy=policy.digest, delivered=delivered))


def _separated(measured: Measurements) -> bool:
    return math.isfinite(measured.ceiling) and math.isfinite(measured.floor) and measured.floor - measured.ceiling >= 0.05


def _editability(scores: Sequence[SampleScore]) -> float | None:
    """Share of the slots that prompts ask for which are seen in their samples; None if none is asked. Reported, not gated yet."""
    asked = sum(s.slots_asked for s in scores)
    return sum(s.slots_right for s in scores) / asked if asked else None


def _counted(scores: Sequence[SampleScore]) -> str:
    """Which gated findings, and in how many samples: "blur 3, grid 1"."""
    samples = Counter(code for s in scores for code in {f.code for f in s.findings} & GATED)
    return ", ".join(f"{code.replace('_', ' ')} {n}" for code, n in sorted(samples.items(), key=lambda item: (-item[1], item[0])))


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _deliver(measured: Measurements, policy: GatePolicy) -> tuple[str, ...]:
    """Samples that pass, without findings where there are any such, at most `max_delivered`: the most alike first, then each time the one
    farthest in appearance from all chosen so far, so that a few show what the Adapter can do. Equals by likeness, then by digest.
    """
    good = [i for i, s in enumerate(measured.scores) if is_person(s, measured, policy) and not is_copy(s, policy) and not is_defective(s)]
    clean = [i for i in good if not measured.scores[i].findings] or good
    left = list({measured.scores[i].image: i for i in reversed(clean)}.values())          # one picture once
    chosen: list[int] = []
    while left and len(chosen) < policy.max_delivered:
        left.sort(key=lambda i: (-min((_apart(measured, i, j) for j in chosen), default=0.0), -(measured.scores[i].position or 0.0), measured.scores[i].image))
        chosen.append(left.pop(0))
    return tuple(measured.scores[i].image for i in chosen)


def _apart(measured: Measurements, i: int, j: int) -> float:
    return measured.apart[max(i, j)][min(i, j)] if measured.apart else 0.0
