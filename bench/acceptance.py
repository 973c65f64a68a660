"""`python -m bench.acceptance`: how likely a set of photos is accepted, measured by personalising many.

Reserved rendered users, the product from end to end with the settings in force: sets of 5, 8, 12 and 16 of a user's photos, chosen by chance with a
fixed seed, are enrolled in a home of the bench's own and taken through a night (`likeness nightly`, which goes on where it was stopped). Of each
set it is noted what intake knew of it (`models.quality.prospects`) and what the gate said. About 100 s of one core for each set.

    python -m bench.acceptance --rounds 1                 one set of each of 24 users
    python -m bench.acceptance --rounds 1 --ship          and write the rows where `likeness inspect` reads them
    python -m bench.acceptance --real FOLDER ...          also sets of photos of real men: one folder, PERSON-ANYTHING, is one set

The table beside it says what an estimate is worth for somebody new: every person's sets are estimated from all other people's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from bench.cells import Cells
from likeness.acceptance import ENOUGH_ROWS, Fit, Prospect, Trial, Trials, left_out
from likeness.intake.sources import open_source
from likeness.night import last_outcome
from likeness.settings import Settings, load_settings
from models.faces.photos import inspect_photos
from models.quality import prospects
from tasks.runtime import Tools

SIZES = (5, 8, 12, 16)
SEED = 20261127
EPOCH = 1              # raise it when `prospect_of` measures something else


@dataclass(frozen=True)
class Chosen:
    """One set: whose photos, which, and under which id they are enrolled."""

    id: str
    person: str
    noun: str
    files: tuple[Path, ...]
    people: str = "rendered"


def choose(users: Path, nouns: dict[str, str], *, rounds: int) -> list[Chosen]:
    """`rounds` sets of each user, sizes taken in turn, so that whatever part of the list is done is balanced."""
    rng = random.Random(SEED)
    names = sorted(nouns)
    rng.shuffle(names)
    chosen = []
    for r in range(rounds):
        for i, name in enumerate(names):
            count = SIZES[(i + 3 * r) % len(SIZES)]
            files = sorted(rng.sample(sorted((users / name).glob("*.jpg")), count))
            chosen.append(Chosen(f"r{len(chosen):02d}-{name}-{count}", name, nouns[name], tuple(files)))
    return chosen


def enrol(tools: Tools, sets: Sequence[Chosen], folder: Path) -> None:
    """Copy each set into a folder of its own and enrol it."""
    from flows.terminal import enrolment_of

    for one in sets:
        place = folder / one.id
        place.mkdir(parents=True, exist_ok=True)
        for file in one.files:
            if not (place / file.name).exists():
                shutil.copyfile(file, place / file.name)
        tools.enrol(enrolment_of(str(place), one.id, one.noun, "a bench: rendered people, or photos published for tests"))


def rows(tools: Tools, sets: Sequence[Chosen], folder: Path, cells: Cells) -> list[tuple[Chosen, Trial]]:
    """Of each set that was judged: what intake knows of it now, and what the gate said."""
    done: list[tuple[Chosen, Trial]] = []
    for one in tqdm(sets, desc="prospects", unit="set", disable=None):
        outcome = last_outcome(tools.store, one.id)
        if outcome is None or outcome.kind not in ("accepted", "retry", "rejected"):
            continue
        depends = {"epoch": EPOCH, "base": tools.base_ref.revision, "backend": tools.faces.name, "files": [(f.name, f.stat().st_size) for f in one.files], "who": one.person}
        known = cells.numbers("prospect", depends, lambda one=one: _prospect(tools, folder / one.id))
        if known is not None:
            done.append((one, Trial(prospect=Prospect.model_validate(known), accepted=outcome.kind == "accepted", people=one.people,
                                    identity_share=_share(tools, one.id))))
    return done


def _prospect(tools: Tools, folder: Path) -> dict[str, Any] | None:
    found = inspect_photos(open_source(str(folder), store=tools.store, policy=tools.settings.intake), tools=tools.faces, policy=tools.settings.intake)
    prospect = prospects.prospect_of(tools.base, found.accepted, tools.faces) if found.set.verdict == "ok" else None
    return None if prospect is None else prospect.plain()


def _share(tools: Tools, subject: str) -> float | None:
    """Share of samples recognised as the person, of the newest judgement."""
    outcome = last_outcome(tools.store, subject)
    values = [r.value for r in outcome.reasons if r.code in ("identity", "accepted")] if outcome is not None else []
    return values[0] if values else None


def worth(done: Sequence[tuple[Chosen, Trial]]) -> dict[str, float]:
    """What estimates by other people's sets are worth: Brier score (0 is best) beside that of the mean rate, and AUC; NaN where it means nothing."""
    trials, people = [t for _, t in done], [c.person for c, _ in done]
    guessed, truth = np.array(left_out(trials, people)), np.array([float(t.accepted) for t in trials])
    rates = np.array([np.mean([t.accepted for c, t in done if c.person != who]) for who in people])
    both = 0 < truth.mean() < 1
    return {"sets": len(trials), "accepted": float(truth.mean()), "brier": float(np.mean((guessed - truth) ** 2)), "brier_of_the_rate": float(np.mean((rates - truth) ** 2)),
            "auc": float(roc_auc_score(truth, guessed)) if both else float("nan")}


def run_night(home: Path) -> None:
    """The product's own night over everybody who is due."""
    subprocess.run([sys.executable, "-m", "flows.cli", "nightly", "--id", "acceptance"], env={**os.environ, "LIKENESS_HOME": str(home)}, check=False)


def ship(settings: Settings, tools: Tools, done: Sequence[tuple[Chosen, Trial]], command: str) -> None:
    """Write the rows where `likeness inspect` reads them, in place of those of the same base."""
    new = Trials(base=settings.base, revision=tools.base_ref.revision, recipe=settings.recipe.digest, policy=settings.gate.digest, drawn=prospects.drawn_by(settings), backend=tools.faces.recogniser_name,
                 date=datetime.now(UTC).date().isoformat(), command=command, rows=tuple(trial for _, trial in done))
    kept = [t for t in prospects.shipped() if t.base != new.base] if prospects.FILE.exists() else []
    lines = [json.dumps({k: v for k, v in t.plain().items() if k != "rows"})[:-1] + ', "rows": [\n' + ",\n".join(" " + json.dumps(r.plain()) for r in t.rows) + "\n]}"
             for t in (*kept, new)]
    prospects.FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--real", type=Path, nargs="*", default=[], help="folders with photos of one real man each, called PERSON-ANYTHING")
    p.add_argument("--rounds", type=int, default=1, help="sets of each user")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--threads", type=int)
    p.add_argument("--only-look", action="store_true", help="train nothing: the sets that are done")
    p.add_argument("--ship", action="store_true", help="write the rows to models/quality/acceptance.json")
    a = p.parse_args()
    if not a.users.is_dir():
        p.error(f"no rendered users in {a.users}: name their folder with --users")
    if a.threads:
        torch.set_num_threads(a.threads)
        os.environ["OMP_NUM_THREADS"] = str(a.threads)
    home, folder = (a.out / "acceptance").resolve(), (a.out / "acceptance" / "photos").resolve()
    settings = load_settings(overrides={"home": str(home), "max_attempts": 1})
    tools = Tools(settings)
    sets = choose(a.users, json.loads(Path(__file__).with_name("users.json").read_text()), rounds=a.rounds)
    sets += [Chosen(f"a-real-{place.name}", place.name.rsplit("-", 1)[0], "man", tuple(sorted(p for p in place.iterdir() if p.is_file())), people="real") for place in a.real]
    enrol(tools, sets, folder)
    if not a.only_look:
        run_night(home)
    done = rows(tools, sets, folder, Cells(a.out / "cells"))
    table = Table("photos", "sets", "accepted", "identity share, median", "kept, median", title=f"{len(done)} of {len(sets)} sets are done")
    for count in sorted({t.prospect.photos for _, t in done}):
        own = [t for _, t in done if t.prospect.photos == count]
        shares = [t.identity_share for t in own if t.identity_share is not None]
        table.add_row(str(count), str(len(own)), str(sum(t.accepted for t in own)), f"{np.median(shares):.2f}" if shares else "-", f"{np.median([t.prospect.kept for t in own]):.3f}")
    Console().print(table)
    most = max(Counter(c.person for c, _ in done).values(), default=0)
    if len(done) - most < ENOUGH_ROWS:                       # everybody is estimated without their own sets
        Console().print(f"{len(done)} sets are too few for an estimate")
        return
    Console().print({k: round(v, 3) for k, v in worth(done).items()})
    fit = Fit([t for _, t in done])
    Console().print("estimates by (kept, photos):", {(k, n): fit.estimate(Prospect(photos=n, kept=k), date="").accepted for k in (0.35, 0.4, 0.45, 0.5, 0.6) for n in (5, 16)})
    (a.out / "acceptance.json").write_text(json.dumps([{"set": c.id, **t.plain()} for c, t in done], indent=1) + "\n")
    if a.ship:
        ship(settings, tools, done, f"python -m bench.acceptance --rounds {a.rounds}{' --real ...' if a.real else ''}")


if __name__ == "__main__":
    main()
