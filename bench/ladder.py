"""Whether the retry ladder turns refusals into acceptances: `python -m bench.ladder`.

    python -m bench.ladder [--count 4] [--attempts 3] [--sets man=FOLDER ...]

Reserved rendered users, eight photos each, go through `likeness run` with recipes that are wrong on purpose, so that the gate refuses the first attempt, and with `--attempts`
allowed: how many are accepted at once, and how many within the ladder, by which rungs. With --sets also those photos, with the recipe in force: who was refused
elsewhere (`python -m bench.acceptance`), or real people. Goes on where it was stopped: every stage is in a home of the bench's own.

| recipe | what is wrong |
|---|---|
| too short | a sixteenth of the steps |
| too hot | eight times the learning rate |
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from likeness.recipe import Recipe
from likeness.settings import load_settings

PHOTOS = 8
WRONG: Mapping[str, tuple[str, float]] = {"too short": ("steps", 1 / 16), "too hot": ("learning_rate", 8.0)}      # key of the recipe, and what it is multiplied by
AS_IT_IS = "in force"


@dataclass(frozen=True)
class Climb:
    """One subject: who, whose photos, with which recipe at first."""

    name: str
    recipe: str
    files: tuple[Path, ...]
    noun: str

    @property
    def subject(self) -> str:
        """Their id."""
        return f"{self.recipe.replace(' ', '-')}-{self.name}".lower()


def chosen(users: Path, nouns: Mapping[str, str], *, count: int, sets: Sequence[tuple[str, Path]]) -> list[Climb]:
    """The same users, evenly spaced, for every wrong recipe; user by user, so that whatever part is done is balanced."""
    names = sorted(nouns)[:: max(1, len(nouns) // max(1, count))][:count]
    climbs = [Climb(name, recipe, tuple(sorted((users / name).glob("*.jpg"))[:PHOTOS]), nouns[name]) for name in names for recipe in WRONG]
    return climbs + [Climb(place.name, AS_IT_IS, tuple(sorted(p for p in place.iterdir() if p.is_file())), noun) for noun, place in sets]


def wrong(recipe: Recipe, name: str) -> str:
    """The likeness.toml that makes the settings' recipe wrong; empty where it is in force."""
    if name not in WRONG:
        return ""
    key, factor = WRONG[name]
    value = getattr(recipe, key) * factor
    return f"[recipe]\nmethod = {json.dumps(recipe.method)}\n{key} = {max(1, round(value)) if key == 'steps' else value}\n"


def run(one: Climb, home: Path, *, attempts: int) -> dict[str, Any]:
    """The document of `likeness run --json`.

    Raises:
        RuntimeError: it ended with an error.
    """
    photos = home / "photos" / one.subject
    photos.mkdir(parents=True, exist_ok=True)
    for file in one.files:
        (photos / file.name).write_bytes(file.read_bytes())
    config = home / f"{one.recipe.replace(' ', '-')}.toml"
    config.write_text(wrong(load_settings().recipe, one.recipe))
    ended = subprocess.run([sys.executable, "-m", "flows.cli", "run", str(photos), "--subject", one.subject, "--class", one.noun, "--attempts", str(attempts), "--json"],
                           env={**os.environ, "LIKENESS_HOME": str(home), "LIKENESS_CONFIG": str(config)}, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode not in (0, 3):
        raise RuntimeError(f"{one.subject} ended with {ended.returncode}: what is written above says why; the same command goes on")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def told(attempts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each attempt: what it was, and what the gate said."""
    return [f"{n}. {a['why'] if n > 1 else 'at first'} -> {a['verdict']}" + ("" if a["verdict"] == "accepted" else f" ({', '.join(r['code'] for r in a['reasons'])})")
            + f", identity {100 * (a['scores'].get('identity_share') or 0):.0f} %" for n, a in enumerate(attempts, 1)]


def table(done: Mapping[str, Mapping[str, Any]], climbs: Sequence[Climb], *, attempts: int) -> Table:
    """What is shown."""
    shown = Table("recipe at first", "users", "accepted at once", *[f"within {n}" for n in range(2, attempts + 1)])
    for recipe in (*WRONG, AS_IT_IS):
        own = [done[c.subject]["attempts"] for c in climbs if c.recipe == recipe and c.subject in done and done[c.subject]["attempts"]]
        if own:
            within = [sum(any(a["verdict"] == "accepted" for a in tried[:n]) for tried in own) for n in range(1, attempts + 1)]
            shown.add_row(recipe, str(len(own)), *map(str, within))
    return shown


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--count", type=int, default=4, help="how many users")
    p.add_argument("--attempts", type=int, default=3)
    p.add_argument("--sets", nargs="*", default=[], metavar="NOUN=FOLDER", help="further photos of one person each, with the recipe in force")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if not a.users.is_dir():
        p.error(f"no rendered users in {a.users}: name their folder with --users")
    if a.threads:
        torch.set_num_threads(a.threads)
        os.environ["OMP_NUM_THREADS"] = str(a.threads)
    sets = [(noun, Path(place)) for noun, _, place in (named.partition("=") for named in a.sets)]
    if odd := [str(place) for noun, place in sets if not noun or not place.is_dir()]:
        p.error(f"--sets takes NOUN=FOLDER of photos that are there; {odd[0]!r} is none")
    home = (a.out / "ladder").resolve()
    climbs = chosen(a.users, json.loads(Path(__file__).with_name("users.json").read_text()), count=a.count, sets=sets)
    done: dict[str, dict[str, Any]] = {}
    for one in climbs:
        done[one.subject] = run(one, home, attempts=a.attempts)
        print("\n  ".join([one.subject, *told(done[one.subject]["attempts"])]), flush=True)
        (a.out / "ladder.json").write_text(json.dumps({name: {k: d[k] for k in ("verdict", "attempts")} for name, d in done.items()}, indent=1) + "\n")
    Console().print(table(done, climbs, attempts=a.attempts))


if __name__ == "__main__":
    main()
