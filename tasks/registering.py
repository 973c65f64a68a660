"""register: an accepted Adapter becomes a Release, exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from prefect import task

from likeness.dossier import Dossier
from likeness.lineage import walk
from likeness.once import Claim
from likeness.recipe import Recipe
from likeness.records import Adapter, Intake, Release, Sample, SampleScore, SampleSet, TrainingSet
from likeness.stages import Call, StageRef
from tasks import pictures
from tasks.judging import Judgement, drawn_besides
from tasks.policy import RETRIED
from tasks.reporting import shown
from tasks.runtime import Outcome, Tools, runtime
from tasks.training import weights_of


@task(name="register", task_run_name="register {subject}", **RETRIED)
def register_release(subject: str, refs: dict[str, StageRef], recipe: Recipe, report_html: str, seconds: dict[str, float]) -> Outcome:
    """Register the accepted adapter in MLflow; the claim on the stage makes it exactly one, the registry converges what a crash left."""
    tools = runtime()
    call = Call(stage="register", subject=subject, inputs=(refs["ingest"], refs["assemble"], refs["train"], refs["sample"], refs["judge"]),
                params={"recipe": recipe.plain(), "base": tools.base_ref.digest})

    def make(claim: Claim) -> Release:
        def check() -> None:
            tools.standing(subject)                            # a forgotten subject's claim is gone too, but says less clearly why
            claim.check()

        return tools.registry.register(_dossier(tools, subject, refs, recipe, report_html, seconds), check=check)

    return tools.once(call, make, Release)


def _dossier(tools: Tools, subject: str, refs: dict[str, StageRef], recipe: Recipe, report_html: str, seconds: dict[str, float]) -> Dossier:
    adapter = tools.open(refs["train"], subject, Adapter)
    samples, judgement = tools.open(refs["sample"], subject, SampleSet), tools.open(refs["judge"], subject, Judgement)
    more = drawn_besides(tools, subject, refs["judge"])
    grid = sample_grid(tools, (*samples.samples, *more), (*judgement.measured.scores, *judgement.measured.more))
    return Dossier(subject=tools.standing(subject).subject, photos=tools.open(refs["ingest"], subject, Intake).photos,
                   training_set=tools.open(refs["assemble"], subject, TrainingSet), recipe=recipe, base=tools.base_ref, adapter=adapter, samples=samples, more=more,
                   verdict=judgement.verdict, stages=tuple(refs.values()), lineage=walk(tools.store, subject, refs["judge"]).as_json(),
                   weights=weights_of(tools.store, adapter), report_html=report_html, samples_png=grid, seconds=seconds)


def sample_grid(tools: Tools, samples: Sequence[Sample], scores: Sequence[SampleScore], *, columns: int = 8) -> bytes:
    """All samples on one PNG, covered where the report covers them."""
    by_image = {s.image: s for s in scores}
    images: Sequence[Any] = [shown(pictures.get(tools.store, s.image), by_image.get(s.image.sha256)) for s in samples]
    blank = np.full_like(images[0], 255)
    rows = [np.concatenate([*images[i:i + columns], *[blank] * (columns - len(images[i:i + columns]))], axis=1) for i in range(0, len(images), columns)]
    return pictures.encode_png(np.concatenate(rows, axis=0))
