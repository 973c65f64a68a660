"""The runbook: every command in it exists, every setting and file that it names is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.cli._app import _app as prefect

from likeness.settings import load_settings
from tests.docs_check import blocks_of
from tests.infra.test_infra import programs

SYMPTOMS = ("The night did not start", "\"TOO MANY FAILED\"", "A worker is silent", "GPU out of memory", "Claims that stay", "The bucket", "MLflow is down",
            "Prefect's database is full, or locked", "Disk full", "Consent is withdrawn", "Restore from a backup", "Rotate secrets", "Upgrade")


@pytest.fixture(scope="module")
def runbook(root: Path) -> Path:
    return root / "infra" / "runbook.md"


def commands(runbook: Path) -> Iterator[list[str]]:
    """Words of every command of ours and of Prefect's and MLflow's, in blocks and in lines."""
    text = runbook.read_text()
    lines = [line for block in blocks_of(runbook) for line in block.body.splitlines()] + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        line = line.rpartition(" -- ")[2] if line.startswith("kubectl") else re.sub(r"^docker compose .* worker-control |^sudo -u likeness ", "", line)
        words = shlex.split(line, comments=True)
        if words[:1] and words[0] in ("likeness", "prefect", "mlflow") and len(words) > 1:
            yield words


def options_of(program: str, words: list[str]) -> tuple[str, set[str]]:
    """The command that is meant, by its whole name, and its options; fails if there is none."""
    if program == "prefect":
        at: Any = prefect
        name = program
        for word in words:
            if word.startswith("-") or at.default_command is not None:
                break
            at, name = at[word], f"{name} {word}"
        assert at.default_command is not None, name
        return name, {option for argument in at.assemble_argument_collection() for option in argument.names}
    command = programs()[program][words[0]]
    name = f"{program} {words[0]}"
    while hasattr(command, "commands"):                                         # a group; Typer's are of a click of its own
        words = words[1:]
        command, name = command.commands[words[0]], f"{name} {words[0]}"
    return name, {option for parameter in command.params for option in parameter.opts}


def test_every_command_of_the_runbook_exists(runbook: Path) -> None:
    seen = set()
    for program, *words in commands(runbook):
        name, options = options_of(program, words)
        seen.add(name)
        assert {w for w in words if w.startswith("--")} <= options, name
    assert {"likeness status", "likeness doctor", "likeness recover", "likeness forget", "likeness subject resume", "prefect deployment run", "prefect deployment schedule pause",
            "prefect flow-run ls", "mlflow db upgrade"} <= seen


def test_each_symptom_has_its_entry(runbook: Path) -> None:
    assert [title for title in re.findall(r"^## (.*)$", runbook.read_text(), re.MULTILINE) if title != "Reach it"] == list(SYMPTOMS)


def test_what_the_runbook_names_is_there(root: Path, runbook: Path) -> None:
    text = runbook.read_text()
    known = {key for key, _, _ in load_settings().explain()} | {"store.patience_s"}                  # of a bucket
    named = re.findall(r"`((?:night|deploy|claims|retention|sampling|registry|schedule|store)\.[a-z_]+)", text)
    assert named
    assert set(named) <= known
    for path in re.findall(r"\b((?:infra|docs)/[\w./-]+\.(?:md|yaml|json))", text):
        assert (root / path.replace("ROLE", "gpu")).exists(), path
    codes = re.findall(r"^\| (`[a-z_`, ]+`) \|", text, re.MULTILINE)
    from likeness.errors import LikenessError

    def below(cls: type[LikenessError]) -> set[str]:
        return {cls.code}.union(*map(below, cls.__subclasses__()))

    assert {code for row in codes for code in re.findall(r"`(\w+)`", row)} <= below(LikenessError) | {"unexpected"}
