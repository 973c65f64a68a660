"""`likeness deploy`, `up`, `status`, `down`, `recover`: what the nights need, on a server and on this machine."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows.terminal import Config, Json, err, keep_to_home, prefect_address, print_json
from likeness.night import enrolled, last_nights
from likeness.settings import Settings, load_settings, own_file

if TYPE_CHECKING:
    from flows.deploying import Difference
    from flows.recovering import LostRun
    from flows.services import Seen
    from likeness.once import HeldClaim
    from tasks.runtime import Tools


def deploy(dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be made or changed.")] = False,
           as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the deployments as a prefect.yaml and ask no server.")] = False,
           as_json: Json = False, config: Config = None) -> None:
    """Make or update work pools, deployments, the nightly schedule and the automations for runs that die on the Prefect server at PREFECT_API_URL. Run it again after a change of settings."""
    settings = load_settings(config)
    address = None if as_yaml else prefect_address()
    keep_to_home(settings.home)
    if address is None:
        from flows.deploying import as_prefect_yaml, plan_of

        typer.echo(as_prefect_yaml(plan_of(settings)), nl=False)
        return

    found = _deployed(address, settings, dry_run=dry_run)
    if as_json:
        print_json({"server": address, "dry_run": dry_run, "differences": [d.as_json() for d in found]})
        return
    for line in found:
        Console().print(("would " if dry_run else "") + _in_words(line.as_json()), markup=False, highlight=False, soft_wrap=True)
    if not found:
        typer.echo("nothing to do: the server holds what the settings say")


def _deployed(address: str, settings: Settings, *, dry_run: bool = False) -> list[Difference]:
    from flows.deploying import apply, connected, differences, plan_of

    async def carry_out() -> list[Difference]:
        async with connected(address) as client:
            return await (differences if dry_run else apply)(client, plan_of(settings))

    return asyncio.run(carry_out())


def up(as_json: Json = False, config: Config = None) -> None:
    """Start a Prefect server, an MLflow server and a worker for each pool on this machine, on loopback, and deploy to them. What runs already is left alone.

    With up.postgres_port their tables are kept by PostgreSQL, with up.bucket_port the store is a bucket of an S3 server: docs/service.md.
    """
    from flows import services

    settings = load_settings(config)
    keep_to_home(settings.home)

    def deploy_to(address: str) -> None:
        _deployed(address, settings)

    found = services.up(settings, own_file(config), deploy=deploy_to, tell=lambda words: err.print(words, markup=False, soft_wrap=True))
    if as_json:
        print_json({"services": [s.as_json() for s in found]})
        return
    _show_services(found)
    typer.echo(f"for commands of your own: export PREFECT_API_URL={services.prefect_api(settings)}")


def status(as_json: Json = False, config: Config = None) -> None:
    """What `likeness up` started and how it fares, who is due tonight, and the last nights. Exit code 1 if something that was started does not answer."""
    from flows import services
    from tasks.runtime import Tools

    settings = load_settings(config)
    keep_to_home(settings.home)
    found = services.seen(settings)
    tools = Tools(settings)
    due, left = _due(tools)
    nights = last_nights(tools.store, 5)
    if as_json:
        print_json({"services": [s.as_json() for s in found], "schedule": settings.schedule.model_dump(), "due": due, **left, "nights": [n.plain() for n in nights]})
    else:
        _show_services(found)
        typer.echo(f"schedule: {settings.schedule.cron}, {settings.schedule.timezone}")
        typer.echo(f"due: {len(due)}{''.join(f', {why} {len(who)}' for why, who in left.items())}")
        for night in nights:
            typer.echo(f"night {night.night}: {'ok' if night.ok else 'TOO MANY FAILED'}; {', '.join(f'{kind} {n}' for kind, n in night.counts.items() if n)}")
    raise typer.Exit(1 if any(s.state in ("crashed", "silent") for s in found) else 0)


def _due(tools: Tools) -> tuple[list[str], dict[str, list[str]]]:
    if not enrolled(tools.store):
        return [], {"unchanged": [], "paused": [], "set_aside": []}
    from flows.nightly import due_now  # the networks come with it, 5 s

    return due_now(tools)


def down(as_json: Json = False, config: Config = None) -> None:
    """Stop what `likeness up` started in this home, and nothing else. A night that is under way is ended; the same night goes on when it is started again."""
    from flows import services

    names = services.down(load_settings(config), tell=lambda words: err.print(words, markup=False))
    if as_json:
        print_json({"stopped": names})
    elif not names:
        typer.echo("nothing to stop: `likeness up` started nothing in this home")


def recover(yes: Annotated[bool, typer.Option("--yes", help="Declare runs whose worker is gone as crashed, and abort uploads to a bucket that were begun more than a day "
                                                 "ago; without it both are only listed.")] = False,
            as_json: Json = False, config: Config = None) -> None:
    """What a crash left behind: runs that hold a slot of a pool though their worker is gone, uploads to a bucket, and claims, which the next run takes over by itself."""
    from flows import services
    from flows.recovering import unfinished_uploads
    from likeness.once import held_claims
    from tasks.runtime import Tools

    settings = load_settings(config)
    keep_to_home(settings.home)
    tools = Tools(settings)
    claims, uploads = held_claims(tools.store), unfinished_uploads(tools, abort=yes)
    address = os.environ.get("PREFECT_API_URL") or (services.prefect_api(settings) if services.started_prefect(settings) else None)
    lost, declared = _lost(address, settings, yes) if address is not None else ([], [])
    if as_json:
        print_json({"server": address, "runs": [r.as_json() for r in lost], "declared_crashed": [str(r.id) for r in declared], "claims": [_claim_as_json(c) for c in claims],
                    "uploads": [{"key": u.key, "since": u.since.isoformat(), "aborted": yes} for u in uploads]})
        return
    for run in lost:
        words = "declared crashed" if run in declared else "it ended by itself meanwhile" if yes else "holds a slot: add --yes to declare it crashed"
        Console().print(f"run {run.name}: {run.state}, worker {run.worker} of pool {run.pool} is gone; {words}", markup=False, highlight=False, soft_wrap=True)
    told = {True: "its process lives", False: "its process is dead; the next run takes it over", None: "of another machine; if it is silent, it is taken over after its TTL"}
    for claim in claims:
        Console().print(f"claim {claim.stage} of {claim.subject}: attempt {claim.attempt}, {claim.progress or 'no progress'}; {told[claim.lives]}", markup=False,
                        highlight=False, soft_wrap=True)
    for upload in uploads:
        Console().print(f"upload of {upload.key}: begun {upload.since:%Y-%m-%d %H:%M} and not finished; {'aborted' if yes else 'add --yes to abort it'}", markup=False,
                        highlight=False, soft_wrap=True)
    if address is None:
        typer.echo("no Prefect server was asked: PREFECT_API_URL is not set, and `likeness up` started none here")
    elif not lost and not claims and not uploads:
        typer.echo("nothing was left behind")


def _claim_as_json(claim: HeldClaim) -> dict[str, Any]:
    return {"subject": claim.subject, "stage": claim.stage, "attempt": claim.attempt, "progress": claim.progress, "lives": claim.lives}


def _lost(address: str, settings: Settings, yes: bool) -> tuple[list[LostRun], list[LostRun]]:
    from flows.deploying import connected
    from flows.recovering import declare_crashed, lost_runs

    async def look() -> tuple[list[LostRun], list[LostRun]]:
        async with connected(address) as client:
            lost = await lost_runs(client, (settings.deploy.control_pool, settings.deploy.cpu_pool, settings.deploy.gpu_pool))
            return lost, await declare_crashed(client, lost) if yes else []

    return asyncio.run(look())


def prune(dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False, as_json: Json = False, config: Config = None) -> None:
    """Delete what attempts left that no Release was made of, checkpoints that nobody goes on from, and old reports, as [retention] says. Run it daily."""
    from flows.pruning import prune_all
    from tasks.runtime import Tools

    found = prune_all(Tools(load_settings(config)), dry_run=dry_run)
    if as_json:
        print_json(found)
    else:
        for pruned in found["subjects"]:
            if pruned["busy"]:
                Console().print(f"{pruned['subject']}: somebody is making a stage of theirs; left alone", markup=False, highlight=False, soft_wrap=True)
        total = {what: sum(p[what] for p in found["subjects"]) for what in ("records", "blobs", "checkpoints", "waiting")}
        typer.echo(f"{'would delete' if dry_run else 'deleted'}: records {total['records']}, adapters and samples {total['blobs']}, checkpoints {total['checkpoints']}, "
                   f"reports {found['reports']}; unneeded and not for long enough: {total['waiting']}")
        for failure in found["failed"]:
            Console().print(f"{failure['subject']}: {failure['message']}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if found["failed"] else 0)


def _show_services(found: Sequence[Seen]) -> None:
    table = Table("service", "state", "since (UTC)", "pid", Column("address", overflow="fold"))
    for s in found:
        colour = {"running": "green", "crashed": "red", "silent": "yellow"}.get(s.state)
        table.add_row(s.name, f"[{colour}]{s.state}[/]" if colour else s.state, (s.since or "")[:19].replace("T", " "), str(s.pid or ""), escape(s.address or ""))
    Console().print(table)
    for s in found:
        if s.state in ("crashed", "silent"):
            Console().print(f"{s.name}: see {s.log}", markup=False, soft_wrap=True)


def _in_words(difference: dict[str, Any]) -> str:
    if difference["action"] == "create":
        return f"create {difference['what']}"
    if difference["field"] in ("parameters", "trigger", "actions"):
        return f"change {difference['what']}: its {difference['field']}"
    return f"change {difference['what']}: {difference['field']} from {json.dumps(difference['from'])} to {json.dumps(difference['to'])}"
