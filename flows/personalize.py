"""personalize: one subject, from photos to a Release or an honest refusal.

    ingest -> crop -> caption -> assemble -> train -> sample -> judge -> register

The flow holds no state: every task asks the Store whether its output is published. Killed anywhere and run again, it goes on where it was.
A refusal is a result, not a failure: the flow completes and returns the Verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact

from likeness.records import Adapter, Intake, Reason, Release, Verdict
from likeness.stages import STAGES, StageRef
from tasks.ingesting import ingest_photos
from tasks.judging import Judgement, judge_samples
from tasks.preparing import assemble_training_set, caption_portraits, crop_portraits
from tasks.registering import register_release
from tasks.reporting import write_report
from tasks.runtime import Outcome, Tools, runtime
from tasks.sampling import sample_battery
from tasks.training import train


@dataclass
class Run:
    """What has happened so far: the references, and how each was come by."""

    subject: str
    refs: dict[str, StageRef] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    progress: Any = None            # id of the progress artifact

    def took(self, outcome: Outcome) -> StageRef:
        """Note a stage's outcome; returns its reference."""
        stage = outcome.ref.stage
        self.refs[stage] = outcome.ref
        self.seconds[stage] = round(outcome.seconds, 3)
        (self.executed if outcome.executed else self.reused).append(stage)
        if self.progress is not None:
            update_progress_artifact(artifact_id=self.progress, progress=100 * len(self.refs) / len(STAGES), description=f"{stage} done")
        return outcome.ref


@flow(name="personalize", flow_run_name="personalize {subject}", persist_result=False, validate_parameters=False)
def personalize(subject: str) -> dict[str, Any]:
    """Personalise one enrolled subject. The only parameter is the subject's opaque id: parameters stay in Prefect's database.

    Returns:
        The document of `likeness run --json` (docs/reference.md).
    """
    tools = runtime()
    recipe = tools.settings.recipe
    run = Run(subject, progress=create_progress_artifact(progress=0.0, key="stages", description="started"))
    intake_ref = run.took(ingest_photos(subject))
    intake = tools.open(intake_ref, subject, Intake)
    _show_intake(intake)
    if intake.set.verdict != "ok":
        return _finish(tools, run, Verdict(kind="needs_photos", reasons=(Reason(code=intake.set.reason or "unusable_photos", message=intake.set.message),),
                                           scores={}, measured=intake.digest, policy=tools.settings.intake.digest), None)
    noun = tools.standing(subject).subject.noun
    portraits = run.took(crop_portraits(subject, intake_ref))
    captions = run.took(caption_portraits(subject, intake_ref, portraits, noun))
    training_set = run.took(assemble_training_set(subject, portraits, captions))
    adapter = run.took(train(subject, training_set, recipe))
    samples = run.took(sample_battery(subject, training_set, adapter, recipe))
    verdict = tools.open(run.took(judge_samples(subject, training_set, samples)), subject, Judgement).verdict
    release: Release | None = None
    if verdict.kind == "accepted":
        html = write_report(subject, run.refs, recipe, run.seconds, None).html
        release = tools.open(run.took(register_release(subject, dict(run.refs), recipe, html, run.seconds)), subject, Release)
    return _finish(tools, run, verdict, release)


def _finish(tools: Tools, run: Run, verdict: Verdict, release: Release | None) -> dict[str, Any]:
    report = write_report(run.subject, run.refs, tools.settings.recipe, run.seconds, release, verdict=verdict)
    digests = {name: run.refs[stage].digest for name, stage in
               (("intake", "ingest"), ("training_set", "assemble"), ("adapter", "train"), ("samples", "sample"), ("judgement", "judge")) if stage in run.refs}
    if "train" in run.refs:
        adapter = tools.open(run.refs["train"], run.subject, Adapter)
        digests |= {"recipe": adapter.recipe, "base": adapter.base, "weights": adapter.weights.sha256}
    create_table_artifact(key="verdict", description=f"verdict: {verdict.kind}",
                          table=[{"reason": r.code, "message": r.message, "value": r.value, "needed": r.needed} for r in verdict.reasons])
    create_markdown_artifact(key="summary", markdown="\n".join([f"# {run.subject}: {verdict.kind}", *(f"* {r.message}" for r in verdict.reasons), "",
                                                               "| stage | seconds |", "|---|---|", *(f"| {k} | {v} |" for k, v in run.seconds.items())]))
    return {"subject": run.subject, "verdict": verdict.kind, "reasons": [r.plain() for r in verdict.reasons], "scores": verdict.scores, "digests": digests,
            "release": None if release is None else {"model": release.model, "version": release.version}, "report": str(report.path),
            "seconds": run.seconds, "executed": run.executed, "reused": run.reused}


def _show_intake(intake: Intake) -> None:
    create_table_artifact(key="photos", description=intake.set.message,
                          table=[{"photo": number, "verdict": j.verdict, "reason": j.reason or ""} for number, j in enumerate(intake.judgements)])
