"""personalize: one subject, from photos to a Release or an honest refusal.

    ingest -> crop -> caption -> assemble -> train -> sample -> judge -> register
                                             ^---- next recipe ----'

A verdict `retry` names the next recipe (`likeness.ladder`); the flow carries it out, at most `max_attempts` trainings in all.
The flow holds no state: every task asks the Store whether its output is published. Killed anywhere and run again, it goes on where it was.
A refusal is a result, not a failure: the flow completes and returns the Verdict.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from prefect import Task, flow
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact

from flows.batches import one_on_workers
from likeness.errors import InputError, LikenessError
from likeness.gate import more_seeds
from likeness.ladder import Attempt, Step, best, next_step
from likeness.recipe import Recipe
from likeness.records import Adapter, Intake, Reason, Release, Verdict
from likeness.stages import STAGES, StageRef
from tasks.ingesting import ingest_photos
from tasks.judging import Judgement, judge_samples
from tasks.preparing import assemble_training_set, caption_portraits, crop_portraits
from tasks.registering import register_release
from tasks.reporting import write_report
from tasks.runtime import NotMade, Outcome, Tools, only_looking, runtime
from tasks.sampling import sample_battery
from tasks.showing import show_attempts
from tasks.training import train

log = logging.getLogger(__name__)

FIRST = "the recipe of the settings"
REPEATED = ("train", "sample", "judge")        # the stages of one attempt
TRAINED = ("train", "sample")                   # those of them that a worker with a GPU makes


@dataclass
class Run:
    """What has happened so far: the references, and how each was come by.

    A stage has its own name in the first attempt; in attempt N it is called `train-N`, `sample-N`, `judge-N`. `refs` are the newest. What is drawn besides, and judged with it, is
    called `sample-more` and `judge-more`, in attempt N `sample-N-more` and `judge-N-more`.
    """

    subject: str
    on_workers: bool = False        # stages that workers make are only looked for here
    attempt: int = 1
    recipe: Recipe | None = None    # of that attempt
    more: int = 0                   # seeds of each prompt that it draws besides
    refs: dict[str, StageRef] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    progress: Any = None            # id of the progress artifact

    def took(self, outcome: Outcome, *, again: bool = False) -> StageRef:
        """Note a stage's outcome; returns its reference. `again`: a stage's second call in an attempt, whose reference `refs` has not unless it is judge."""
        stage = outcome.ref.stage
        name = (f"{stage}-{self.attempt}" if self.attempt > 1 and stage in REPEATED else stage) + ("-more" if again else "")
        if not again or stage == "judge":
            self.refs[stage] = outcome.ref
        self.seconds[name] = round(outcome.seconds, 3)
        (self.executed if outcome.executed else self.reused).append(name)
        if self.progress is not None:
            update_progress_artifact(artifact_id=self.progress, progress=100 * len(self.refs) / len(STAGES), description=f"{name} done")
        return outcome.ref

    def make(self, stage: Task[..., Outcome], *given: Any, again: bool = False) -> StageRef:
        """Carry out a stage that workers may make, and note it, as `took` does.

        Raises:
            NotMade: with `on_workers`, if it is not published.
        """
        if not self.on_workers:
            return self.took(stage(*given), again=again)
        with only_looking():
            return self.took(stage.fn(*given), again=again)

    def own_seconds(self, attempt: int) -> dict[str, float]:
        """Durations of what one attempt is made of, under the stages' own names."""
        return {stage + more: self.seconds[name + more] for stage in STAGES for more in ("", "-more")
                if (name := f"{stage}-{attempt}" if attempt > 1 and stage in REPEATED else stage) + more in self.seconds}


@flow(name="personalize", flow_run_name="personalize {subject}", persist_result=False, validate_parameters=False)
def personalize(subject: str, on_workers: bool = False) -> dict[str, Any]:
    """Personalise one enrolled subject: here, or with workers who prepare and train. Parameters stay in Prefect's database, so they hold an opaque id.

    Returns:
        The document of `likeness run --json` (docs/reference.md).
    """
    if on_workers:
        return one_on_workers(runtime(), subject, lambda who: advance(who))
    return _personalized(runtime(), Run(subject, progress=create_progress_artifact(progress=0.0, key="stages", description="started")))


@flow(name="advance", flow_run_name="advance {subject}", persist_result=False, validate_parameters=False)
def advance(subject: str) -> dict[str, Any]:
    """`personalize` as far as it goes where workers prepare and train: what they have published is judged and registered here.

    Returns:
        The document of `personalize`, or what workers must make before the next call:
        `{"subject","needs":{"flow","stage","attempts","error","training_set","recipe","more"}}`, `error` the code with which the last of the stage's attempts gave up.
    """
    run = Run(subject, on_workers=True)
    try:
        return _personalized(runtime(), run)
    except NotMade as missing:
        training = missing.stage in TRAINED
        return {"subject": subject, "needs": {
            "flow": "training" if training else "preparing", "stage": missing.stage, "attempts": missing.found.attempts, "error": missing.found.error,
            "training_set": run.refs["assemble"].model_dump() if training else None, "recipe": run.recipe.plain() if training and run.recipe else None, "more": run.more if training else 0}}


def prepare(tools: Tools, run: Run) -> Intake:
    """From the photos to a TrainingSet, whose reference is then in `run.refs`; not if the photos will not do."""
    intake_ref = run.make(ingest_photos, run.subject)
    intake = tools.open(intake_ref, run.subject, Intake)
    if not run.on_workers:
        _show_intake(intake)
    if intake.set.verdict == "ok":
        portraits = run.make(crop_portraits, run.subject, intake_ref)
        captions = run.make(caption_portraits, run.subject, intake_ref, portraits, tools.standing(run.subject).subject.noun)
        run.make(assemble_training_set, run.subject, portraits, captions)
    return intake


def _personalized(tools: Tools, run: Run) -> dict[str, Any]:
    subject = run.subject
    intake = prepare(tools, run)
    if intake.set.verdict != "ok":
        return _finish(tools, run, Verdict(kind="needs_photos", reasons=(Reason(code=intake.set.reason or "unusable_photos", message=intake.set.message),),
                                           scores={}, measured=intake.digest, policy=tools.settings.intake.digest), tools.settings.recipe, None)
    training_set = run.refs["assemble"]
    attempts: list[Attempt] = []
    made: list[dict[str, StageRef]] = []          # the references of each attempt
    step = Step(tools.settings.recipe, FIRST)
    while step.recipe is not None and len(attempts) < tools.settings.max_attempts:
        run.attempt = len(attempts) + 1
        if attempts:
            tools.watch("attempt", run.attempt, tools.settings.max_attempts, step.why)
        attempts.append(Attempt(step.recipe, _attempt(tools, run, training_set, step.recipe), step.why))
        made.append(dict(run.refs))
        step = next_step(attempts, tools.settings.ladder)
    chosen = best(attempts)
    run.refs = made[chosen]
    recipe, verdict = attempts[chosen].recipe, attempts[chosen].verdict
    ladder = Ladder(attempts, made, chosen, step if verdict.kind == "retry" else None)
    release: Release | None = None
    if verdict.kind == "accepted":
        html = write_report(subject, run.refs, recipe, run.seconds, None, attempts=attempts, chosen=chosen).html
        seconds = run.own_seconds(chosen + 1)
        release = tools.open(run.took(register_release(subject, dict(run.refs), recipe, html, seconds)), subject, Release)
    if release is None or len(attempts) > 1:
        show_attempts(subject, attempts, made, release)
    return _finish(tools, run, verdict, recipe, release, ladder)


def _attempt(tools: Tools, run: Run, training_set: StageRef, recipe: Recipe) -> Verdict:
    run.recipe, run.more = recipe, 0
    adapter = run.make(train, run.subject, training_set, recipe)
    samples = run.make(sample_battery, run.subject, training_set, adapter, recipe)
    judged = tools.open(run.took(judge_samples(run.subject, training_set, samples)), run.subject, Judgement)
    run.more = more_seeds(judged.verdict, judged.measured, tools.settings.gate, prompts=len(tools.settings.battery.prompts))
    if run.more:
        try:
            besides = run.make(sample_battery, run.subject, training_set, adapter, recipe, run.more, again=True)
            return tools.open(run.took(judge_samples(run.subject, training_set, samples, besides, run.refs["judge"]), again=True), run.subject, Judgement).verdict
        except InputError:
            raise                                # forgotten meanwhile
        except (NotMade, LikenessError) as e:    # an accepted Adapter is not lost for want of a few samples more
            if isinstance(e, NotMade) and e.found.error is None:
                raise
            log.warning("%s: what was drawn besides is left out (%s)", run.subject, e.found.error if isinstance(e, NotMade) else e.code)
    return judged.verdict


@dataclass(frozen=True)
class Ladder:
    """All attempts of a run with their references, which one counts, and what would come next; None if nothing would."""

    attempts: list[Attempt] = field(default_factory=list)
    made: list[dict[str, StageRef]] = field(default_factory=list)
    chosen: int = 0
    step: Step | None = None

    def as_json(self) -> list[dict[str, Any]]:
        """`attempts` of the document of `likeness run --json`."""
        return [{"recipe": a.recipe.digest, "method": a.recipe.method, "verdict": a.verdict.kind, "why": a.why, "scores": a.verdict.scores,
                 "reasons": [r.plain() for r in a.verdict.reasons], "counts": number == self.chosen,
                 "digests": {name: refs[stage].digest for name, stage in (("adapter", "train"), ("samples", "sample"), ("judgement", "judge"))}}
                for number, (a, refs) in enumerate(zip(self.attempts, self.made, strict=True))]

    def next_as_json(self) -> dict[str, Any] | None:
        """`next` of that document."""
        if self.step is None:
            return None
        recipe = self.step.recipe
        return {"why": self.step.why, "how": None if recipe is None else how_to_allow(len(self.attempts) + 1),
                "recipe": None if recipe is None else recipe.digest, "method": None if recipe is None else recipe.method,
                "values": None if recipe is None else recipe.whole()}


def how_to_allow(attempts: int) -> str:
    """What to do so that one more attempt is made."""
    return f"run the same command with `--attempts {attempts}`, or set `max_attempts = {attempts}`"


def _finish(tools: Tools, run: Run, verdict: Verdict, recipe: Recipe, release: Release | None, ladder: Ladder | None = None) -> dict[str, Any]:
    ladder = ladder or Ladder()
    following = ladder.next_as_json()
    report = write_report(run.subject, run.refs, recipe, run.seconds, release, verdict=verdict, attempts=ladder.attempts, chosen=ladder.chosen,
                          following=following)
    digests = {name: run.refs[stage].digest for name, stage in
               (("intake", "ingest"), ("training_set", "assemble"), ("adapter", "train"), ("samples", "sample"), ("judgement", "judge")) if stage in run.refs}
    curve: dict[str, Any] | None = None
    if "train" in run.refs:
        adapter = tools.open(run.refs["train"], run.subject, Adapter)
        digests |= {"recipe": adapter.recipe, "base": adapter.base, "weights": adapter.weights.sha256}
        curve = adapter.curve.plain() if adapter.curve else None
    create_table_artifact(key="verdict", description=f"verdict: {verdict.kind}",
                          table=[{"reason": r.code, "message": r.message, "value": r.value, "needed": r.needed} for r in verdict.reasons])
    if len(ladder.attempts) > 1:
        create_table_artifact(key="attempts", description=f"attempt {ladder.chosen + 1} counts",
                              table=[{"attempt": n, "method": a.recipe.method, "verdict": a.verdict.kind, "why": a.why} for n, a in enumerate(ladder.attempts, 1)])
    create_markdown_artifact(key="summary", markdown="\n".join([f"# {run.subject}: {verdict.kind}", *(f"* {r.message}" for r in verdict.reasons),
                                                               *([f"* next: {following['why']}"] if following else []), "",
                                                               "| stage | seconds |", "|---|---|", *(f"| {k} | {v} |" for k, v in run.seconds.items())]))
    return {"subject": run.subject, "verdict": verdict.kind, "reasons": [r.plain() for r in verdict.reasons], "scores": verdict.scores, "digests": digests,
            "release": None if release is None else {"model": release.model, "version": release.version}, "report": str(report.path),
            "seconds": run.seconds, "executed": run.executed, "reused": run.reused, "attempts": ladder.as_json(), "next": following, "choice": curve}


def _show_intake(intake: Intake) -> None:
    create_table_artifact(key="photos", description=intake.set.message,
                          table=[{"photo": number, "verdict": j.verdict, "reason": j.reason or ""} for number, j in enumerate(intake.judgements)])
