"""The flows of a night for real workers, with stages that make next to nothing (bench/night.py says what): `python -m bench.night_workers` deploys them.

Everything else is the product: each flow here is the product's own function under its own name, so batches find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow

from bench.night import small_tools
from flows.nightly import nightly as real_nightly
from flows.preparing import preparing as real_preparing
from flows.training import training as real_training
from likeness.settings import load_settings
from tasks import runtime


def _begin() -> None:
    runtime.configure(small_tools(load_settings()))


@flow(name="nightly", persist_result=False, validate_parameters=False)
def nightly(night: str | None = None, limit: int | None = None, deadline_s: float | None = None, on_workers: bool = True) -> dict[str, Any]:
    _begin()
    found: dict[str, Any] = real_nightly.fn(night, limit, deadline_s, on_workers)
    return found


@flow(name="preparing", flow_run_name="preparing", persist_result=False, validate_parameters=False)
def preparing(subjects: Sequence[str]) -> Any:
    _begin()
    return real_preparing.fn(subjects)


@flow(name="training", flow_run_name="training", persist_result=False, validate_parameters=False)
def training(trainings: Sequence[Mapping[str, Any]]) -> Any:
    _begin()
    return real_training.fn(trainings)
