"""A Prefect server inside the test process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prefect.client.orchestration import PrefectClient

Ask = Callable[[Callable[[PrefectClient], Awaitable[Any]]], Any]


@contextmanager
def _undone(patch: pytest.MonkeyPatch) -> Iterator[None]:
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    """Runs a coroutine with a client of a Prefect server in this process, its database the session's own. One for all files: a second one has no queue for its background work."""
    from prefect.client import base
    from prefect.server.api.server import create_app

    patient = pytest.MonkeyPatch()          # Prefect waits 30 s for its own server, a busy machine takes longer
    start = base.LifespanManager
    patient.setattr(base, "LifespanManager", lambda app, **_: start(app, startup_timeout=300, shutdown_timeout=60))
    with asyncio.Runner() as runner, _undone(patient):
        client = PrefectClient(create_app(ephemeral=True))
        runner.run(client.__aenter__())
        try:
            yield lambda what: runner.run(what(client))
        finally:
            runner.run(client.__aexit__(None, None, None))
