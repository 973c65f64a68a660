"""`likeness deploy`: what the nights need on a server."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.terminal import Config, Json, keep_to_home, prefect_address, print_json
from likeness.settings import load_settings


def deploy(dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be made or changed.")] = False,
           as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the deployments as a prefect.yaml and ask no server.")] = False,
           as_json: Json = False, config: Config = None) -> None:
    """Make or update work pools, deployments and the nightly schedule on the Prefect server at PREFECT_API_URL. Run it again after a change of settings."""
    settings = load_settings(config)
    address = None if as_yaml else prefect_address()
    keep_to_home(settings.home)
    from flows.deploying import Difference, Plan, apply, as_prefect_yaml, connected, differences, plan_of

    plan = plan_of(settings)
    if address is None:
        typer.echo(as_prefect_yaml(plan), nl=False)
        return

    async def carry_out(address: str, plan: Plan) -> list[Difference]:
        async with connected(address) as client:
            return await (differences if dry_run else apply)(client, plan)

    found = asyncio.run(carry_out(address, plan))
    if as_json:
        print_json({"server": address, "dry_run": dry_run, "differences": [d.as_json() for d in found]})
        return
    for line in found:
        Console().print(("would " if dry_run else "") + _in_words(line.as_json()), markup=False, highlight=False, soft_wrap=True)
    if not found:
        typer.echo("nothing to do: the server holds what the settings say")


def _in_words(difference: dict[str, Any]) -> str:
    if difference["action"] == "create":
        return f"create {difference['what']}"
    if difference["field"] == "parameters":
        return f"change {difference['what']}: its parameters"
    return f"change {difference['what']}: {difference['field']} from {json.dumps(difference['from'])} to {json.dumps(difference['to'])}"
