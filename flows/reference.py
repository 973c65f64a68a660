"""The reference, written from the code: commands with their options, and every setting with its default, limits and reason.

python -m flows.reference > docs/reference.md        (a test compares the two)
"""

from __future__ import annotations

import json
import sys
from typing import Any, get_args

import typer
from pydantic import BaseModel

from flows.cli import app
from likeness.recipe import METHODS, PRESETS, Training
from likeness.settings import Section, Settings

EXITS = """| exit code | meaning |
|---|---|
| 0 | accepted; inspect: the set can be used; lineage: every digest holds |
| 1 | something broke; lineage: a digest does not hold |
| 2 | wrong usage, unusable photos, or the verdict `needs_photos` |
| 3 | the verdict `retry` or `rejected`, or no Release |"""

HEAD = ("| key | default | limits | reason |", "|---|---|---|---|")


def render() -> str:
    """The whole page."""
    parts = ["# Reference", "", "Written by `python -m flows.reference`; do not edit by hand.", "", "## Commands", ""]
    command: Any = typer.main.get_command(app)
    for name, sub in _commands(command):
        parts += [f"### `likeness {name}`", "", " ".join((sub.help or "").split()), "", "| argument | default | meaning |", "|---|---|---|"]
        for parameter in sub.params:
            if parameter.name == "help":
                continue
            label = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name.upper()
            default = "required" if parameter.required else "" if parameter.default in (None, False) else f"`{parameter.default}`"
            parts.append(f"| `{label}` | {default} | {getattr(parameter, 'help', '') or ''} |")
        parts.append("")
    parts += [EXITS, "", "## Settings", "", *HEAD, *_settings(Settings, ""), ""]
    parts += ["## Recipes", "", "The keys of `[recipe]`, and of each entry of `ladder`, by method. Defaults are those of the maquette.", ""]
    for method, kind in METHODS.items():
        parts += [f"### `method = \"{method}\"`", "", " ".join((kind.__doc__ or "").split()), "", *HEAD, *_settings(kind, "recipe."), ""]
    for base, presets in PRESETS.items():
        parts += [f"On base `{base}`, unless named otherwise:", "", *(f"* `{method}`: `{json.dumps(values)}`" for method, values in presets.items()), ""]
    return "\n".join(parts)


def _commands(group: Any, before: str = "") -> list[tuple[str, Any]]:
    """Every command by its full name; a group's commands one after the other."""
    found = []
    for name, sub in sorted(group.commands.items()):
        found += _commands(sub, f"{before}{name} ") if hasattr(sub, "commands") else [(f"{before}{name}", sub)]
    return found


def _settings(model: type[BaseModel], prefix: str, kind: str = "") -> list[str]:
    rows = []
    for name, info in model.model_fields.items():
        if isinstance(info.default, Section) and (kinds := get_args(info.annotation)):
            for one in kinds:
                rows += _settings(one, f"{prefix}{name}.", f"kind = {one.model_fields['kind'].default}")
            continue
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            rows += _settings(info.annotation, f"{prefix}{name}.")
            continue
        default = ("required" if kind else "in likeness.toml") if info.is_required() else "see Recipes" if isinstance(info.default, Training) else f"`{info.default!r}`"
        limits = ", ".join(str(m) for m in info.metadata).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {default} | {limits} | {': '.join(words for words in (kind, (info.description or '').replace('|', ' or ')) if words)} |")
    return rows


if __name__ == "__main__":
    sys.stdout.write(render())
