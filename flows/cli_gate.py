"""`likeness gate ...`: the thresholds in force, how often each errs, and measuring it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from flows.terminal import Config, Json, bars, print_json
from likeness.calibration import Calibrations
from likeness.errors import RecipeError, translated
from likeness.settings import load_settings

gate = typer.Typer(name="gate", no_args_is_help=True, help="What an adapter must reach, and how often that errs: show, calibrate.")


@gate.command()
def show(as_json: Json = False, config: Config = None) -> None:
    """The thresholds in force, and beside each how often it was measured to err: on which data, when."""
    from tasks.calibrations import known_of
    from tasks.runtime import Tools

    settings = load_settings(config)
    found, words = known_of(Tools(settings))
    if as_json:
        print_json({"policy": settings.gate.plain(), "digest": settings.gate.digest, "calibrations": None if found is None else _document(found), "message": words})
        return
    if found is None:
        table = Table("threshold", "value")
        for key, value in settings.gate.plain().items():
            table.add_row(key, str(value))
        Console().print(table)
    else:
        Console().print(_table(found))
    Console().print(words, markup=False)


@gate.command()
def calibrate(users: Annotated[Path, typer.Option(help="A folder with a folder of photos for each person, who may be rendered.", exists=True, file_okay=False)],
              nouns: Annotated[Path | None, typer.Option(help="JSON: name of a folder to man, woman or person; strangers are then of the same. Without it everybody is a person.",
                                                         exists=True, dir_okay=False)] = None,
              out: Annotated[Path | None, typer.Option(help="Also write what was measured to this file, as JSON.", dir_okay=False)] = None,
              as_json: Json = False, config: Config = None) -> None:
    """Measure how often each threshold errs, on photos of people of whom the truth is known; nothing is trained. Kept in the store, where reports find it: rates alone, no photo."""
    from tasks import calibrations
    from tasks.runtime import Tools

    settings = load_settings(config)
    named = {} if nouns is None else _nouns(nouns)
    with bars() as tell:
        tools = Tools(settings, watch=tell)
        found = calibrations.calibrate(tools, users, named, today=datetime.now(UTC).date(), tell=tell,
                                       command="likeness gate calibrate --users FOLDER" + ("" if nouns is None else " --nouns FILE"))
    calibrations.keep(tools, found)
    if out is not None:
        _write(out, found)
    if as_json:
        print_json(_document(found))
        return
    Console().print(_table(found))
    Console().print(f"{found.pictures} pictures of {found.people} people; kept in the store as {found.digest}", soft_wrap=True)


def _nouns(path: Path) -> dict[str, str]:
    try:
        return TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as e:
        raise RecipeError(f"{path.name!r} is no JSON object of folder names and class nouns, like {{\"900000\": \"woman\"}}") from e


def _write(path: Path, found: Calibrations) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with translated("writing the calibrations"):
        part.write_text(json.dumps([found.plain()], indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def _document(found: Calibrations) -> dict[str, Any]:
    return {"digest": found.digest, **found.plain()}


def _table(found: Calibrations) -> Table:
    """A row for each threshold that was measured; what was not is said below, with its reason."""
    table = Table("threshold", "value", "wrongly let through", "wrongly refused", "both equal at", title="how often each threshold errs, % (95 % interval)",
                  caption="; ".join(f"{row.threshold} not measured: {row.unmeasured}" for row in found.rows if row.unmeasured), caption_justify="left")
    for row in found.rows:
        if row.false_accept is not None and row.false_refusal is not None:
            equal = "" if row.equal is None else f"{row.equal.value:.3g} ({max(row.equal.false_accept, row.equal.false_refusal):.1%})"
            table.add_row(row.threshold, "" if row.value is None else f"{row.value:g}", row.false_accept.words, row.false_refusal.words, equal)
    return table
