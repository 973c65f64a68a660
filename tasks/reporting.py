"""The report of a run: one self-contained HTML file, also kept in the Store under the subject."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from likeness import gate
from likeness.errors import InputError
from likeness.ladder import Attempt
from likeness.lineage import walk
from likeness.recipe import Recipe
from likeness.records import Adapter, CaptionSet, Intake, Portrait, PortraitSet, Release, Sample, SampleScore, SampleSet, Verdict
from likeness.report import PhotoView, PortraitView, ReportView, SampleView, render_report
from likeness.stages import STAGES, StageRef
from likeness.version import code_version
from tasks import pictures
from tasks.calibrations import known_of
from tasks.judging import Judgement, drawn_besides
from tasks.runtime import Tools, runtime

THUMBNAIL_PX = 160
COVERED = 4                      # squares along each side of what may not be seen


@dataclass(frozen=True)
class Report:
    """The document and where it was written."""

    html: str
    path: Path


def write_report(subject: str, refs: dict[str, StageRef], recipe: Recipe, seconds: dict[str, float], release: Release | None, *,
                 verdict: Verdict | None = None, attempts: Sequence[Attempt] = (), chosen: int = 0, following: Mapping[str, Any] | None = None) -> Report:
    """Write what is known so far below the home folder, replacing the subject's last report.

    `attempts` are all of the run, `refs` and `recipe` those of the `chosen` one; `following` is `next` of `likeness run --json`.
    """
    tools = runtime()
    view = _view(tools, subject, refs, recipe, seconds, release, verdict)
    html = render_report(replace(view, attempts=tuple(attempts), chosen=chosen, following=following))
    path = tools.settings.home / "reports" / f"{subject}.html"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(html, encoding="utf-8")
    part.replace(path)
    try:
        tools.standing(subject)                    # forgotten while it was written: it must not stay
    except InputError:
        path.unlink(missing_ok=True)
        raise
    return Report(html, path)


def _view(tools: Tools, subject: str, refs: dict[str, StageRef], recipe: Recipe, seconds: dict[str, float], release: Release | None, verdict: Verdict | None) -> ReportView:
    store = tools.store
    intake = tools.open(refs["ingest"], subject, Intake)
    used = iter(intake.photos)
    photos = []
    for judgement in intake.judgements:
        kept = judgement.verdict in ("accept", "normalise") and intake.photos
        photo = next(used, None) if kept else None
        photos.append(PhotoView(judgement, _small(pictures.get(store, photo.blob)) if photo else None))
    portraits: list[PortraitView] = []
    if "caption" in refs:
        held = _held_out(tools, subject, refs)
        both = zip(tools.open(refs["crop"], subject, PortraitSet).portraits, tools.open(refs["caption"], subject, CaptionSet).captions, strict=True)
        portraits = [PortraitView(p, webp(pictures.get(store, p.crop)), webp(pictures.get(store, p.mask)), caption=c, held_out=p.digest in held) for p, c in both]
    samples: list[SampleView] = []
    bare: list[SampleView] = []
    judgement_ = tools.open(refs["judge"], subject, Judgement) if "judge" in refs else None
    if "sample" in refs:
        drawn, measured = tools.open(refs["sample"], subject, SampleSet), judgement_.measured if judgement_ else None
        samples = _sample_views(tools, drawn.samples, measured.scores if measured else ())
        bare = _sample_views(tools, drawn.bare, measured.bare if measured else ())
        if measured and measured.more:
            samples += _sample_views(tools, drawn_besides(tools, subject, refs["judge"]), measured.more)
    calibrations, calibrated = known_of(tools)
    return ReportView(
        subject=tools.standing(subject).subject, photos=tuple(photos), set_judgement=intake.set, portraits=tuple(portraits), recipe=recipe, base=tools.base_ref,
        adapter=tools.open(refs["train"], subject, Adapter) if "train" in refs else None, samples=tuple(samples), bare=tuple(bare), measured=judgement_.measured if judgement_ else None,
        policy=tools.settings.gate, calibrations=calibrations, calibrated=calibrated, verdict=judgement_.verdict if judgement_ else verdict, release=release,
        base_scores=judgement_.measured.base if judgement_ else tools.base_scores(tools.standing(subject).subject.noun),
        lineage=walk(store, subject, release or _furthest(refs)).as_json(), seconds=seconds, code=code_version())


def _sample_views(tools: Tools, samples: Sequence[Sample], scores: Sequence[SampleScore]) -> list[SampleView]:
    by_image = {s.image: s for s in scores}
    views = []
    for sample in samples:
        pixels, score = pictures.get(tools.store, sample.image), by_image.get(sample.image.sha256)
        views.append(SampleView(sample, webp(shown(pixels, score)), score=score, size_px=(pixels.shape[1], pixels.shape[0])))
    return views


def shown(pixels: NDArray[np.uint8], score: SampleScore | None) -> NDArray[np.uint8]:
    """A sample (H, W, 3) as pages show it: only its colours where it was judged unsafe, or could not be judged for that."""
    if score is None or gate.is_showable(score.findings):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((COVERED, COVERED), Image.Resampling.BOX).resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.NEAREST))


def _furthest(refs: dict[str, StageRef]) -> StageRef:
    return [refs[stage] for stage in STAGES if stage in refs][-1]


def _held_out(tools: Tools, subject: str, refs: dict[str, StageRef]) -> set[str]:
    from likeness.records import TrainingSet

    witnesses: tuple[Portrait, ...] = tools.open(refs["assemble"], subject, TrainingSet).held_out if "assemble" in refs else ()
    return {p.digest for p in witnesses}


def _small(pixels: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return webp(np.asarray(picture))


def webp(pixels: NDArray[np.uint8]) -> bytes:
    """A picture as it is shown in a page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=82)
    return buffer.getvalue()
