"""The flows of a night for real workers, with stages that make next to nothing (bench/night.py says what): `python -m bench.night_workers` deploys them.

Everything else is the product: each flow here is the product's own function under its own name, so batches find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from prefect import flow

from bench.night import made
from flows.nightly import nightly as real_nightly
from flows.preparing import preparing as real_preparing
from flows.training import training as real_training
from likeness.once import Claim
from likeness.settings import load_settings
from tasks import runtime


class Small(runtime.Tools):
    """Tools whose stages are claimed and published, and make `made`."""

    def once(self, call: Any, make: Any, output: Any) -> Any:
        def small(claim: Claim) -> Any:
            return made(self, call, output)
        return super().once(call, small, output)


def _begin() -> None:
    tools = Small(load_settings())
    tools.__dict__["bank"] = SimpleNamespace(digest="b" * 64)
    runtime.configure(tools)


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
