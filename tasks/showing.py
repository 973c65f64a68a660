"""What MLflow shows of attempts, refused ones among them: no stage, because nothing reads it and nothing depends on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from prefect import task

from likeness import attempt_registry
from likeness.attempt_registry import Attempts
from likeness.erasure import check_not_forgotten
from likeness.errors import LikenessError, SubjectForgotten
from likeness.ladder import Attempt
from likeness.records import Adapter, Release, TrainingSet
from likeness.stages import StageRef
from tasks.runtime import runtime

log = logging.getLogger(__name__)


@task(name="show attempts", task_run_name="show attempts {subject}", persist_result=False)
def show_attempts(subject: str, tried: Sequence[Attempt], made: Sequence[dict[str, StageRef]], release: Release | None) -> None:
    """Nested runs in MLflow, unless exactly these were shown before, which a note in the Store says.

    A verdict does not wait for a server that only shows it: what could not be shown is logged, and the next run of the subject tries again.

    Raises:
        SubjectForgotten: meanwhile; what was shown is erased again.
    """
    tools = runtime()
    who = tools.standing(subject).subject
    adapters = [tools.open(refs["train"], subject, Adapter).digest for refs in made]
    training_set = tools.open(made[0]["assemble"], subject, TrainingSet).digest
    attempts = Attempts(who, tools.base_ref, training_set, tried, adapters, release)
    note = f"subjects/{subject}/shown/{attempts.digest}.json"
    if tools.store.get(note) is not None:
        return
    try:
        attempt_registry.show_attempts(tools.registry, attempts, check=lambda: check_not_forgotten(tools.store, subject))
    except SubjectForgotten:
        raise
    except LikenessError as e:
        log.warning("%s: the attempts could not be shown in MLflow (%s)", subject, e.code)
    else:
        tools.store.put_if_absent(note, attempts.digest.encode())
