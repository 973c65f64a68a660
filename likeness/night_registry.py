"""A night in MLflow: one run of the experiment `likeness.nights`, with its numbers and its page. Nothing in it names a subject."""

from __future__ import annotations

import time

from likeness.night import Night
from likeness.registry import Registry

EXPERIMENT = "likeness.nights"
TAG = "likeness.night"


def show_night(registry: Registry, night: Night, page: str) -> str:
    """Make MLflow show a night; a night that is joined is the same run with newer numbers. Two that do so at the same moment may leave two runs.

    Args:
        registry: where MLflow is.
        night: its numbers.
        page: its HTML page.

    Returns:
        The run's id.

    Raises:
        ServerUnreachable: if MLflow does not answer.
    """
    with registry.talking("showing the night"):
        from mlflow.entities import Metric

        client = registry.client
        experiment = registry.experiment(EXPERIMENT, folder="nights", tags={})
        runs = client.search_runs([experiment], f"tags.`{TAG}` = '{night.night}'", max_results=1, order_by=["attributes.start_time ASC"])
        run = runs[0] if runs else client.create_run(experiment, tags={TAG: night.night}, run_name=f"night {night.night}")
        now_ms = int(time.time() * 1000)
        numbers = {f"subjects.{kind}": float(count) for kind, count in night.counts.items()}
        numbers |= {f"reasons.{code}": float(count) for code, count in night.reasons.items()}
        numbers |= {f"seconds.{stage}": seconds for stage, seconds in night.seconds.items()}
        numbers |= {"ok": float(night.ok)} | ({} if night.took_s is None else {"took_s": night.took_s})
        client.log_batch(run.info.run_id, metrics=[Metric(name, value, now_ms, 0) for name, value in numbers.items()])
        client.log_text(run.info.run_id, page, "night.html")
        client.set_terminated(run.info.run_id, "FINISHED" if night.ok else "FAILED")
        return str(run.info.run_id)
