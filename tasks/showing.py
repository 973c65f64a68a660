"""What MLflow shows of attempts, refused ones among them: no stage, because nothing reads it and nothing depends on it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task

from likeness import attempt_registry
from likeness.attempt_registry import Attempts
from likeness.erasure import check_not_forgotten
from likeness.ladder import Attempt
from likeness.records import Adapter, Release, TrainingSet
from likeness.stages import StageRef
from tasks.policy import RETRIED
from tasks.runtime import runtime


@task(name="show attempts", task_run_name="show attempts {subject}", **RETRIED)
def show_attempts(subject: str, tried: Sequence[Attempt], made: Sequence[dict[str, StageRef]], release: Release | None) -> None:
    """Nested runs in MLflow, unless exactly these were shown before, which a note in the Store says."""
    tools = runtime()
    who = tools.standing(subject).subject
    adapters = [tools.open(refs["train"], subject, Adapter).digest for refs in made]
    training_set = tools.open(made[0]["assemble"], subject, TrainingSet).digest
    attempts = Attempts(who, tools.base_ref, training_set, tried, adapters, release)
    note = f"subjects/{subject}/shown/{attempts.digest}.json"
    if tools.store.get(note) is None:
        attempt_registry.show_attempts(tools.registry, attempts, check=lambda: check_not_forgotten(tools.store, subject))
        tools.store.put_if_absent(note, b"{}")
