"""preparing: subjects from their photos to a TrainingSet, on a worker without a GPU."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.batches import told
from flows.personalize import Run, prepare
from likeness.errors import LikenessError
from tasks.runtime import runtime

log = logging.getLogger(__name__)


def _name_of_run() -> str:
    return f"preparing {len(flow_run.parameters['subjects'])}"


@flow(name="preparing", flow_run_name=_name_of_run, persist_result=False, validate_parameters=False)
def preparing(subjects: Sequence[str]) -> Any:
    """Ingest, crop, caption and assemble, one subject after the other; what goes wrong with one is theirs alone.

    Returns:
        A state that says how many seconds each stage took and how many failed, by code.
    """
    tools, seconds, failed = runtime(), Counter[str](), Counter[str]()
    for subject in subjects:
        run = Run(subject)
        with alone(failed):
            prepare(tools, run)
        seconds.update(run.seconds)
    return Completed(message=told(seconds, failed))


@contextmanager
def alone(failed: MutableMapping[str, int]) -> Iterator[None]:
    """What goes wrong inside is counted by its code and ends nothing else: who sent the subject finds that it is not made, and why."""
    try:
        yield
    except LikenessError as e:
        failed[e.code] = failed.get(e.code, 0) + 1
    except Exception as e:
        log.exception("an unexpected error with one subject of a batch")
        failed[type(e).__name__] = failed.get(type(e).__name__, 0) + 1
