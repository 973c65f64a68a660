"""Which failures are retried, how often and how long apart: the whole policy, in one place.

Transient errors come back with exponential backoff, up to a cap, and jitter; a resource error gets one more try; input, recipe and integrity errors
never do, nor does a bug.
"""

from __future__ import annotations

from typing import Any

from likeness.errors import ResourceError, TransientError

DELAYS_S = (2.0, 4.0, 8.0, 16.0, 32.0, 60.0)       # two minutes in all: a server that is started again is back by then
RESOURCE_RETRIES = 1


async def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: decide by the class of the error."""
    error = await state.aresult(raise_on_failure=False)
    if isinstance(error, TransientError):
        return True
    return isinstance(error, ResourceError) and bool(task_run.run_count <= RESOURCE_RETRIES)


RETRIED: dict[str, Any] = {
    "retries": len(DELAYS_S),
    "retry_delay_seconds": list(DELAYS_S),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": worth_retrying,
    "persist_result": False,          # results would be pickled, world-readable, and outlive the run: the Store is the truth
}
