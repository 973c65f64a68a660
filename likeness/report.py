"""The report of one run: a single HTML file that needs nothing else, no script, no network. A pure function of a ReportView."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from likeness import gate
from likeness.calibration import Calibrations
from likeness.dossier import flatten
from likeness.errors import RecipeError
from likeness.gate import GatePolicy
from likeness.ladder import Attempt
from likeness.night import Night
from likeness.recipe import Recipe
from likeness.records import (
    Adapter,
    BaseRef,
    BaseScores,
    Caption,
    Curve,
    CurvePoint,
    Finding,
    Measurements,
    PhotoJudgement,
    Portrait,
    Release,
    Sample,
    SampleScore,
    SetJudgement,
    Subject,
    Verdict,
)


@dataclass(frozen=True)
class PhotoView:
    """One file that was given; `thumbnail` is PNG, WebP or JPEG, None if it could not be decoded or is not shown."""

    judgement: PhotoJudgement
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class PortraitView:
    """One crop with its mask (same size, grey, 255 is face) and caption."""

    portrait: Portrait
    crop: bytes
    mask: bytes | None = None
    caption: Caption | None = None
    held_out: bool = False


@dataclass(frozen=True)
class SampleView:
    """One sample and what was measured on it; findings are drawn on it where its size is known."""

    sample: Sample
    image: bytes
    score: SampleScore | None = None
    size_px: tuple[int, int] | None = None      # width, height: the frame of the findings' boxes


@dataclass(frozen=True)
class ReportView:
    """Everything the report shows; what a run did not reach stays empty, and its section says so or is left out.

    Attributes:
        lineage: the document of `likeness lineage --json`.
        seconds: duration of each stage, in order.
        reused: stages that were found published, not executed by this run.
        attempts: all attempts of the run, shown side by side where there are several; the rest of the page is about the `chosen` one.
        following: `next` of `likeness run --json`: what would be tried next, and how to allow it.
        calibrations: how often the thresholds err; None where nobody measured it under these conditions, `calibrated` says what is known in words.
    """

    subject: Subject
    photos: tuple[PhotoView, ...] = ()
    set_judgement: SetJudgement | None = None
    portraits: tuple[PortraitView, ...] = ()
    recipe: Recipe | None = None
    base: BaseRef | None = None
    adapter: Adapter | None = None
    samples: tuple[SampleView, ...] = ()
    bare: tuple[SampleView, ...] = ()
    measured: Measurements | None = None
    policy: GatePolicy | None = None
    calibrations: Calibrations | None = None
    calibrated: str = ""
    verdict: Verdict | None = None
    release: Release | None = None
    base_scores: BaseScores | None = None
    lineage: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    reused: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    chosen: int = 0
    following: Mapping[str, Any] | None = None
    code: str = ""


HEADLINES = {
    "accepted": ("Accepted", "The samples show this person, and the adapter may be used."),
    "retry": ("Not yet", "This training did not pass. Another recipe may help, and the photos are good enough to try."),
    "needs_photos": ("Other photos are needed", "With these photos no training can be judged, so none is accepted."),
    "rejected": ("Rejected", "Nothing could be measured that would allow this adapter to be used."),
    None: ("Not judged", "The run ended before there was anything to judge."),
}
SHARES = {
    "identity_share": ("Recognisably this person", "min_identity_share", "at least"),
    "one_face_share": ("Exactly one face", "min_face_share", "at least"),
    "copy_share": ("Repeats of a training photo", "max_copy_share", "at most"),
    "defect_share": ("Samples with a defect", "max_defect_share", "at most"),
    "editability": ("Prompt details followed", "editability_needed", "at least"),
    "drift_share": ("This person where nobody was asked for", "max_drift_share", "at most"),
}
WORDS = {"accept": "used", "normalise": "used after repair", "reject": "refused", "ignore": "ignored"}


def render_contact_sheet(photos: Sequence[PhotoView], judgement: SetJudgement, *, expected: str, code: str) -> str:
    """What `likeness inspect` shows, as one HTML document. `expected` says how likely acceptance is.

    Raises:
        RecipeError: if a thumbnail is not PNG, WebP or JPEG.
    """
    return _template("contact_sheet.html.j2").render(**_photos(photos, judgement), expected=expected, code=code)


OUTCOMES = {"accepted": "accepted", "retry": "not yet good enough", "needs_photos": "need other photos", "rejected": "rejected", "failed": "failed",
            "deferred": "left for another night", "set_aside": "set aside after failing too often", "paused": "paused", "unchanged": "nothing new"}


def render_night(night: Night, *, code: str) -> str:
    """A night as one HTML document: numbers alone, nothing of anybody."""
    everybody = sum(night.counts.values())
    good = {"accepted": True, "failed": False}
    rows = [{"label": OUTCOMES.get(kind, kind), "count": night.counts[kind], "width": 100 * night.counts[kind] / max(1, everybody), "good": good.get(kind)}
            for kind in sorted(night.counts, key=lambda kind: [*OUTCOMES, kind].index(kind)) if night.counts[kind]]
    return _template("night.html.j2").render(night=night, everybody=everybody, rows=rows, timings=_bars(night.seconds), code=code)


def _photos(photos: Sequence[PhotoView], judgement: SetJudgement | None) -> dict[str, Any]:
    """What photos.html.j2 reads."""
    used = [p for p in photos if p.judgement.verdict in ("accept", "normalise")]
    return {"photos": photos, "set_judgement": judgement, "used": used, "refused": [p for p in photos if p not in used], "words": WORDS}


def render_report(view: ReportView) -> str:
    """The whole HTML document.

    Raises:
        RecipeError: if a picture of the view is not PNG, WebP or JPEG.
    """
    title, lead = HEADLINES[view.verdict.kind if view.verdict else None]
    return _template("report.html.j2").render(
        **_photos(view.photos, view.set_judgement), view=view, title=title, lead=lead, kind=view.verdict.kind if view.verdict else "none",
        groups=_by_prompt(view), scale=_scale(view), shares=_shares(view), curve=_curve(view.adapter.losses if view.adapter else ()), choice=_choice(view.adapter.curve if view.adapter else None),
        timings=_timings(view), attempts=_attempts(view), recipe=list(flatten(view.recipe.whole()).items()) if view.recipe else [])


def data_uri(picture: bytes) -> str:
    """`picture` as a data: URI, its type read from its first bytes.

    Raises:
        RecipeError: if it is not PNG, WebP or JPEG.
    """
    if picture.startswith(b"\x89PNG\r\n\x1a\n"):
        media = "image/png"
    elif picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        media = "image/webp"
    elif picture.startswith(b"\xff\xd8\xff"):
        media = "image/jpeg"
    else:
        raise RecipeError(f"a picture of the report starts with {picture[:8]!r}, PNG, WebP or JPEG is needed")
    return Markup(f"data:{media};base64,{base64.b64encode(picture).decode()}")     # base64 holds nothing that would need escaping


@cache
def _template(name: str) -> Template:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters |= {"data_uri": data_uri, "percent": _percent, "number": _number, "duration": _duration}
    return environment.get_template(name)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value * 100:.0f}\u00a0%"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 0.95:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _by_prompt(view: ReportView) -> list[dict[str, Any]]:
    """Samples grouped by category and prompt, in the order of the battery, those of nobody in particular last, each with what was measured in plain words."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    besides = {score.image for score in view.measured.more} if view.measured else set()
    for item in view.samples:
        notes = [*_notes(item.score, view), *(["drawn besides"] if item.sample.image.sha256 in besides else []), *_covered(item.score)]
        groups.setdefault((item.sample.category, item.sample.prompt), []).append(
            {"view": item, "notes": notes, "passes": _passes(item.score, view), "marks": _marks(item),
             "delivered": view.verdict is not None and item.sample.image.sha256 in view.verdict.delivered})
    asked = view.policy is not None and view.policy.max_drift_share < 1            # else it is shown, and counts against nobody
    blame = "must not be this person" if asked else "is this person"
    for item in view.bare:
        judged = item.score is not None and view.measured is not None and view.policy is not None
        drifted = gate.is_drifted(item.score, view.measured, view.policy) if judged else None        # type: ignore[arg-type]
        groups.setdefault(("nobody in particular", item.sample.prompt), []).append(
            {"view": item, "notes": [*_notes(item.score, view)[:2], *([blame] if drifted else []), *_covered(item.score)], "passes": None if drifted is None or not asked else not drifted,
             "marks": [], "delivered": False})
    return [{"category": category, "prompt": prompt, "samples": samples} for (category, prompt), samples in groups.items()]


def _passes(score: SampleScore | None, view: ReportView) -> bool | None:
    """What the gate said of this sample alone; None if it was not asked."""
    if score is None or view.policy is None or view.measured is None:
        return None
    alone = score.faces == 1 and not gate.is_copy(score, view.policy) and not gate.is_defective(score)
    return alone and (score.category == gate.STYLISED or gate.is_person(score, view.measured, view.policy))


def _notes(score: SampleScore | None, view: ReportView) -> list[str]:
    if score is None:
        return ["not measured"]
    notes = ["faces not measured" if score.faces is None else f"{score.faces} face{'' if score.faces == 1 else 's'}"]
    notes.append("likeness not measured" if score.position is None else f"likeness {_percent(score.position)}")
    if view.measured is not None and view.measured.second is not None:
        notes.append("second opinion not measured" if score.second_position is None else f"second opinion {_percent(score.second_position)}")
    if score.slots_asked:
        notes.append(f"{score.slots_right} of {score.slots_asked} prompt details")
    if view.policy is not None and gate.is_copy(score, view.policy):
        notes.append("nearness to training photos not measured" if score.nearest_training is None else "repeats a training photo")
    return notes + [_said(finding) for finding in score.findings]


def _covered(score: SampleScore | None) -> list[str]:
    """What is said of a picture that pages do not show."""
    return [] if score is None or gate.is_showable(score.findings) else ["not shown here"]


def _said(finding: Finding) -> str:
    """A finding in words: "blur -1.4, below -1.06"; whether it counts."""
    words = finding.code.replace("_", " ") + (f": {finding.of.replace('_', ' ')}" if finding.of else "")
    if finding.score is not None and finding.threshold is not None and finding.code not in ("no_face", "extra_face"):
        words += f" {_number(finding.score)}, {'below' if finding.score < finding.threshold else 'above'} {_number(finding.threshold)}"
    return words if finding.code in gate.GATED else f"{words} (reported only)"


def _marks(item: SampleView) -> list[dict[str, Any]]:
    """Boxes to draw on a sample, in hundredths of its sides; findings with one box share it, one without a place has none."""
    if item.score is None or item.size_px is None:
        return []
    width, height = item.size_px
    marks: dict[tuple[float, ...], dict[str, Any]] = {}
    for finding in item.score.findings:
        if finding.box_px is not None:
            left, top, right, bottom = finding.box_px
            mark = marks.setdefault(finding.box_px, {"x": 100 * left / width, "y": 100 * top / height, "width": 100 * (right - left) / width,
                                                     "height": 100 * (bottom - top) / height, "names": [], "gated": False})
            mark["names"].append(finding.code.replace("_", " "))
            mark["gated"] = mark["gated"] or finding.code in gate.GATED
    return list(marks.values())


def _scale(view: ReportView) -> dict[str, Any] | None:
    """Each sample as a dot between the impostors' floor (0) and the subject's own ceiling (1)."""
    if view.measured is None:
        return None
    measured, dots = view.measured, []
    for number, score in enumerate(view.measured.scores):
        if score.position is not None:
            dots.append({"x": 100 * score.position, "y": 34 + 9 * (number * 7 % 5 - 2), "stylised": score.category == gate.STYLISED,
                         "passes": _passes(score, view)})
    needed = None
    if view.policy is not None:
        by_distance = gate.position(min(view.policy.max_distance, measured.threshold), floor=measured.floor, ceiling=measured.ceiling)
        needed = min(1.0, max(gate.needed_position(measured, view.policy), by_distance if by_distance is not None else 0.0))
    median = (view.verdict.scores.get("identity_position") if view.verdict else None)
    return {"dots": dots, "needed": needed, "median": median, "unmeasured": sum(s.position is None for s in measured.scores)}


def _shares(view: ReportView) -> list[dict[str, Any]]:
    """Shares of samples as bars, each with what the policy asks."""
    if view.verdict is None:
        return []
    rows = []
    for name, (label, threshold, direction) in SHARES.items():
        if name in view.verdict.scores:
            value, needed = view.verdict.scores[name], _needed(threshold, view, view.verdict)
            good = _reaches(value, needed, direction)
            rows.append({"label": label, "value": value, "needed": needed, "direction": direction, "good": good, "base": getattr(view.base_scores, name, None),
                         "errs": _errs(view, "editability_doubt" if threshold == "editability_needed" else threshold)})
    usual = view.base_scores.spread if view.base_scores else None
    if "spread" in view.verdict.scores and usual:
        spread, least = view.verdict.scores["spread"], _needed("spread_needed", view, view.verdict)
        rows.append({"label": "Diversity of samples that are this person, of what the base alone draws", "value": None if spread is None else min(1.0, spread / usual),
                     "needed": None if least is None else least / usual, "direction": "at least", "good": _reaches(spread, least, "at least"), "base": None,
                     "errs": _errs(view, "min_diversity_share")})
    return rows


def _errs(view: ReportView, threshold: str) -> str:
    """How often a threshold errs, in words; empty where nobody measured it."""
    row = None if view.calibrations is None else view.calibrations.row(threshold)
    return "" if row is None or row.unmeasured is not None else row.words


def _needed(threshold: str, view: ReportView, verdict: Verdict) -> float | None:
    """What is asked of a score: a number of the policy, or one that the Verdict itself names; None if nothing is known to be asked."""
    asked = verdict.scores[threshold] if threshold in verdict.scores else getattr(view.policy, threshold, None)
    return None if threshold == "max_drift_share" and asked == 1 else asked          # all of them may: nothing is asked


def _attempts(view: ReportView) -> list[dict[str, Any]]:
    """Rows of the table of attempts, one cell for each; none where there was one attempt, which the page shows anyway."""
    if len(view.attempts) < 2:
        return []

    def row(label: str, texts: Sequence[str], good: Sequence[bool | None] | None = None) -> dict[str, Any]:
        return {"label": label, "cells": [{"text": text, "good": g} for text, g in zip(texts, good or [None] * len(texts), strict=True)]}

    verdicts = [a.verdict for a in view.attempts]
    rows = [row("Verdict", [HEADLINES[v.kind][0] for v in verdicts], [v.kind == "accepted" for v in verdicts]),
            row("Method", [a.recipe.method.replace("_", " ") for a in view.attempts]), row("Why this recipe", [a.why for a in view.attempts])]
    for name, (label, threshold, direction) in SHARES.items():
        values = [v.scores.get(name) for v in verdicts]
        if any(value is not None for value in values):
            rows.append(row(label, [_percent(value) for value in values],
                            [_reaches(value, _needed(threshold, view, v), direction) for value, v in zip(values, verdicts, strict=True)]))
    if any(v.scores.get("spread") is not None for v in verdicts):
        rows.append(row("Diversity: distance of the two most alike of four samples", [_number(v.scores.get("spread")) for v in verdicts],
                        [_reaches(v.scores.get("spread"), _needed("spread_needed", view, v), "at least") for v in verdicts]))
    return rows


def _reaches(value: float | None, needed: float | None, direction: str) -> bool | None:
    """Whether a share is what the policy asks; None if it asks nothing or nothing was measured."""
    return None if value is None or needed is None else (value >= needed if direction == "at least" else value <= needed)


def _curve(losses: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
    """The loss as points of a 100 x 100 box, y down, with a running mean that the eye can follow; None with fewer than two numbers."""
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    steps, values = [s for s, _ in finite], [v for _, v in finite]
    low, high = min(values), max(values)
    left, span = steps[0], max(steps[-1] - steps[0], 1)

    def points(series: Sequence[float]) -> str:
        return " ".join(f"{100 * (s - left) / span:.2f},{96 - 92 * (v - low) / ((high - low) or 1.0):.2f}" for s, v in zip(steps, series, strict=True))

    smooth, mean = [], values[0]
    for value in values:
        mean += (value - mean) * min(1.0, 8 / len(values) + 0.1)
        smooth.append(mean)
    return {"raw": points(values), "smooth": points(smooth), "low": low, "high": high, "first": steps[0], "last": steps[-1], "final": values[-1]}


def _choice(curve: Curve | None) -> dict[str, Any] | None:
    """The scored checkpoints as points of a 100 x 100 box: likeness to the right, obedience up, both from 0 to 1; what has not both has no dot. None without any."""
    if curve is None:
        return None

    def dot(point: CurvePoint) -> dict[str, Any]:
        measured = point.identity is not None and point.obedience is not None
        return {"point": point, "chosen": point.step == curve.chosen, "x": 100 * (point.identity or 0.0) if measured else None,
                "y": 100 - 100 * (point.obedience or 0.0) if measured else None}
    rows = [dot(point) for point in curve.points]
    dots = [row for row in rows if row["x"] is not None]
    return {"curve": curve, "rows": rows, "dots": dots, "lines": list(pairwise(dots))}


def _timings(view: ReportView) -> list[dict[str, Any]]:
    return _bars(view.seconds, view.reused)


def _bars(seconds: Mapping[str, float], reused: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What timings.html.j2 reads."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [{"stage": stage, "seconds": s, "width": 100 * s / longest, "reused": stage in reused} for stage, s in seconds.items()]
