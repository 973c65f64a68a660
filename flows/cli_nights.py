"""`likeness subject ...` and `likeness nightly`: who is personalised at night, and a night by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.terminal import Config, Json, enrolment_of, prefect_address, print_json, watching
from likeness.errors import InputError, LikenessError
from likeness.intake.sources import STORE_SCHEME
from likeness.night import check_night
from likeness.settings import load_settings

if TYPE_CHECKING:
    from likeness.records import Enrolment
    from tasks.runtime import Tools

subjects = typer.Typer(name="subject", no_args_is_help=True, help="Who is personalised at night: add, list, show, pause, resume.")


def nightly(night: Annotated[str | None, typer.Option("--id", help="Id of the night; the same id again joins it. Default: today's date, UTC.")] = None,
            limit: Annotated[int | None, typer.Option(min=1, help="Subjects at most; the others are deferred.")] = None,
            hours: Annotated[float | None, typer.Option(min=0, help="After so many hours no further subject is begun.")] = None,
            on_workers: Annotated[bool, typer.Option("--on-workers", help="Send batches to the workers of the Prefect server at PREFECT_API_URL, as a scheduled "
                                                     "night does; what they have made is judged and registered here.")] = False,
            as_json: Json = False, config: Config = None) -> None:
    """Personalise everybody who is due: new, changed, or failed last time. Exit 0 unless too many failed for reasons that are not theirs. Run it again after a crash."""
    if night is not None:
        check_night(night)                                       # before anything is started
    if on_workers:
        prefect_address()
    with watching(load_settings(config)):
        from flows.nightly import nightly as personalize_all

        report = personalize_all(night, limit, None if hours is None else hours * 3600, on_workers)
    if as_json:
        print_json(report)
    else:
        table = Table("subject", "outcome", "why", title=f"night {report['night']}: {'ok' if report['ok'] else 'TOO MANY FAILED'}")
        for line in report["accepted"]:
            table.add_row(line["subject"], "accepted", f"version {line['version']}")
        for line in (*report["refused"], *report["failed"]):
            table.add_row(line["subject"], line.get("verdict", "failed"), escape("; ".join(r["message"] for r in line["reasons"])))
        Console().print(table, ", ".join(f"{why} {len(report[why])}" for why in ("deferred", "set_aside", "paused", "unchanged")),
                        *([f"page: {report['page']}"] if report["page"] else []), sep="\n", soft_wrap=True)
    raise typer.Exit(0 if report["ok"] else 1)


@subjects.command()
def add(subject: Annotated[str, typer.Argument(help="An opaque id: small letters, digits, - and _. Never a name.")],
        photos: Annotated[str, typer.Option("--photos", help="A folder, a .zip, or store:PREFIX/ for photos in the store.")],
        consent: Annotated[str, typer.Option(help="Who allowed this: a reference into your own records.")],
        noun: Annotated[str, typer.Option("--class", help="What the subject is: man, woman or person.")] = "person",
        as_json: Json = False, config: Config = None) -> None:
    """Enrol a subject for the nights, or change where their photos are, what they are, or who consented. Nothing is read or trained yet."""
    from tasks.runtime import Tools

    tools, enrolment = Tools(load_settings(config)), enrolment_of(photos, subject, noun, consent)
    if not photos.startswith(STORE_SCHEME) and not Path(photos).exists():
        raise InputError("there is nothing at --photos: name a folder, a .zip, or store:PREFIX/")
    tools.enrol(enrolment, keep_paused=True)
    _show_subject(tools, subject, as_json)


@subjects.command(name="list")
def list_subjects(as_json: Json = False, config: Config = None) -> None:
    """Every enrolled subject, with what their last night made of them."""
    from likeness.night import enrolled
    from tasks.runtime import Tools

    tools = Tools(load_settings(config))
    rows = []
    for subject in enrolled(tools.store):
        try:
            rows.append(_subject_row(tools, tools.standing(subject)))
        except LikenessError as e:                                   # theirs alone: the others are listed
            rows.append({"subject": subject, "error": e.code, "message": e.message})
    if as_json:
        print_json({"subjects": rows})
    else:
        table = Table("subject", "class", "paused", "last night", "outcome")
        for row in rows:
            if "error" in row:
                table.add_row(row["subject"], "", "", "", row["error"])
                continue
            last = row["last"] or {}
            table.add_row(row["subject"], row["class"], "yes" if row["paused"] else "", last.get("night", ""), last.get("kind", "never had one"))
        Console().print(table)


SubjectArgument = Annotated[str, typer.Argument(help="An enrolled subject.")]


@subjects.command()
def show(subject: SubjectArgument, as_json: Json = False, config: Config = None) -> None:
    """One subject: class, consent, where the photos are, and what the last night made of them."""
    from tasks.runtime import Tools

    _show_subject(Tools(load_settings(config)), subject, as_json)


@subjects.command()
def pause(subject: SubjectArgument, as_json: Json = False, config: Config = None) -> None:
    """Leave a subject out of the nights. What is made stays; `likeness forget` erases it."""
    _set_paused(subject, True, as_json, config)


@subjects.command()
def resume(subject: SubjectArgument, as_json: Json = False, config: Config = None) -> None:
    """Let the nights have a paused subject again, or one that was set aside: the next night tries them whatever the last one said."""
    _set_paused(subject, False, as_json, config)


def _set_paused(subject: str, paused: bool, as_json: bool, config: Path | None) -> None:
    from likeness.lineage import check_subject
    from likeness.night import clear_outcome
    from tasks.runtime import Tools

    tools = Tools(load_settings(config))
    tools.enrol(tools.standing(check_subject(subject)).model_copy(update={"paused": paused}))
    if not paused:
        clear_outcome(tools.store, subject)
    _show_subject(tools, subject, as_json)


def _show_subject(tools: Tools, subject: str, as_json: bool) -> None:
    from likeness.lineage import check_subject

    row = _subject_row(tools, tools.standing(check_subject(subject)))
    if as_json:
        print_json(row)
        return
    for name, value in row.items():
        if name != "last":
            Console().print(f"{name}: {value}", markup=False, soft_wrap=True)
    last = row["last"]
    Console().print("last night: none yet" if last is None else f"last night: {last['night']}, {last['kind']}", markup=False)
    for reason in (last or {}).get("reasons", ()):
        Console().print(f"  {reason['message']}", markup=False)


def _subject_row(tools: Tools, enrolment: Enrolment) -> dict[str, Any]:
    from likeness.night import last_outcome

    who, last = enrolment.subject, last_outcome(tools.store, enrolment.subject.id)
    return {"subject": who.id, "class": who.noun, "consent": who.consent.source, "photos": enrolment.source, "paused": enrolment.paused,
            "last": None if last is None else last.plain()}
