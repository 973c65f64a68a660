"""What every command shares: options, progress bars, JSON on standard output, and a process whose Prefect keeps to Likeness's own home."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from likeness.errors import RecipeError
from likeness.intake.sources import STORE_SCHEME
from likeness.settings import Settings

if TYPE_CHECKING:
    from likeness.records import Enrolment

err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output; everything else goes to standard error.")]
Config = Annotated[Path | None, typer.Option("--config", help="A likeness.toml to use instead of the one in this folder.", dir_okay=False)]


def enrolment_of(photos: str, subject: str, noun: str, consent: str) -> Enrolment:
    """What somebody said on the command line, checked. Raises RecipeError, naming every fault."""
    from pydantic import ValidationError

    from likeness.records import Consent, Enrolment, Subject

    try:
        who = Subject.model_validate(dict(id=subject, noun=noun, consent=Consent(source=consent)))
    except ValidationError as e:
        raise RecipeError("; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors(include_input=False))) from e
    return Enrolment(subject=who, source=photos if photos.startswith(STORE_SCHEME) else str(Path(photos).resolve()))


@contextmanager
def watching(settings: Settings) -> Iterator[Any]:
    """Tools whose progress is shown, in a process whose Prefect keeps to Likeness's own home."""
    keep_to_home(settings.home)
    from tasks import runtime

    with bars() as show:
        tools = runtime.Tools(settings, watch=show)
        runtime.configure(tools)
        yield tools


def keep_to_home(home: Path) -> None:
    """Let this process's Prefect write below Likeness's home only; what the environment says already counts. Before Prefect is imported."""
    with suppress(OSError):                    # Prefect makes its own folder, but not the one above it; where neither can be made it says so
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")    # 20 to 40 s on a busy machine
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def prefect_address() -> str:
    """Where the Prefect server is that stays.

    Raises:
        RecipeError: if nobody said.
    """
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise RecipeError("PREFECT_API_URL is not set, and a schedule needs a server that stays: set it to your server's address, "
                          "for example http://prefect.internal:4200/api")
    return address


@contextmanager
def bars() -> Iterator[Any]:
    """A function (stage, done, total, words) that draws one bar for each stage, on standard error."""
    with Progress(TextColumn("{task.description:>9}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(),
                  TextColumn("{task.fields[words]}"), console=err, transient=False) as progress:
        drawn: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, words: str) -> None:
            if stage not in drawn:
                drawn[stage] = progress.add_task(stage, total=max(1, total), words=words)
            if done < total and progress.tasks[drawn[stage]].finished:      # once more, in the next attempt
                progress.reset(drawn[stage])
            progress.update(drawn[stage], completed=done, total=max(1, total), words=words)

        yield show


def print_json(document: Any) -> None:
    """One document on standard output."""
    json.dump(document, sys.stdout, indent=1, ensure_ascii=True)
    sys.stdout.write("\n")
