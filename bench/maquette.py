"""How well the maquette draws people: `make bench-maquette`.

    python -m bench.maquette [--samples 64 --users-count 2 --skip novelty]

Six figures, one table, `bench-results/maquette.json`, plots and a contact sheet. Everything slow is kept under bench-results/cells by the
digest of what it depends on, so the same command goes on where it was stopped. `--work` is the work folder of
`python -m models.maquette.pretrain prepare --data TAR ... --work build/maquette`: its crops of held-out identities are the witnesses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from bench import attributes, charts, drawing, personalisation
from bench.cells import Cells
from bench.drawing import Bench
from likeness.settings import load_settings
from models.diffusion import bases
from models.faces.tools import dlib_tools
from models.maquette import data

FIGURES = ("faces", "adherence", "clip", "vae", "personalisation", "novelty")


def measure(bench: Bench, a: argparse.Namespace) -> dict[str, Any]:
    """All figures that are not skipped, by name."""
    results: dict[str, Any] = {"base": bench.base.ref.revision, "steps": a.steps, "guidance": a.guidance,
                               "weights_mb": round(sum(p.stat().st_size for p in a.weights.rglob("*") if p.is_file()) / 1e6, 1),
                               "unet_parameters_m": round(sum(p.numel() for p in bench.base.unet.parameters()) / 1e6, 2)}
    if "vae" not in a.skip:
        results["vae"] = drawing.figure_vae(bench, count=min(256, a.samples))
    if "clip" not in a.skip:
        results["clip"] = drawing.figure_clip(bench, folder=a.weights / "clip")
    if not {"faces", "novelty"} <= set(a.skip):
        results["faces"], embeddings = drawing.figure_faces(bench, count=a.samples)
        if "novelty" not in a.skip:
            results["novelty"] = drawing.figure_novelty(bench, embeddings, per_identity=2)
    if "adherence" not in a.skip:
        classifier = a.classifier or a.work / "attributes.safetensors"
        if not classifier.exists():
            print("training the attribute classifier, about 4 minutes on one core", flush=True)
            attributes.train(a.work, classifier)
        results["adherence"] = drawing.figure_adherence(bench, count=a.samples, classifier=classifier)
    if "personalisation" not in a.skip:
        users = personalisation.read_users(bench, a.users)
        results["personalisation"] = personalisation.figure(bench, users, count=a.users_count, settings=load_settings(), clip=a.weights / "clip")
        results["recogniser_on_photos"] = personalisation.ceiling(users)
    return results


def lines_of(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, value, beside it) of the table."""
    lines = []
    if f := results.get("faces"):
        lines.append(("1 faces: exactly one, of plain samples", f"{f['one_face']:.1%}", f"none {f['no_face']:.1%}, several {f['several_faces']:.1%}, of {f['samples']}"))
    if f := results.get("adherence"):
        lines.append(("2 adherence: classifier agrees with prompt, mean", f"{f['mean_agreed']:.1%}", f"{f['samples']} samples"))
        lines += [(f"    {slot}", f"{f['agreed'][slot]:.1%}", f"on renders {f['classifier_on_held_out_renders'][slot]:.1%}, by chance {f['chance'][slot]:.1%}")
                  for slot in attributes.JUDGED]
    if f := results.get("clip"):
        lines.append(("3 CLIP: zero-shot on held-out renders, mean", f"{f['mean']:.1%}", f"{f['renders']} renders"))
        lines += [(f"    {slot}", f"{right:.1%}", f"most frequent value {f['most_frequent'][slot]:.1%}") for slot, right in f["accuracy"].items()]
    if f := results.get("vae"):
        lines.append(("4 VAE: PSNR on held-out renders", f"{f['psnr_db']:.2f} dB", f"{f['renders']} renders"))
        lines.append(("    dlib distance to the original, median", f"{f['median_distance']:.3f}", f"below 0.6: {f['distance_below_0.6']:.1%}, face kept {f['face_kept']:.1%}"))
    if f := results.get("personalisation"):
        own, base, photos = f["personalised"], f["base_alone"], results["recogniser_on_photos"]
        lines.append(("5 personalisation: identity AUC", _number(own["auc"]), f"base alone {_number(base['auc'])}, the users' own photos {_number(photos['auc'])}"))
        lines.append(("    true accepts at 1 % false accepts", f"{own['true_accepts']:.1%}", f"base alone {base['true_accepts']:.1%}, own photos {photos['true_accepts']:.1%}"))
        lines.append(("    distance to the witnesses, median", _number(own["median_genuine"]), f"to impostors {_number(own['median_impostor'])}, own photos {_number(photos['median_genuine'])}"))
        lines.append(("    exactly one face", f"{own['one_face']:.1%}", f"base alone {base['one_face']:.1%}; {len(f['users'])} users x {f['samples_each']} samples"))
        s = f["seconds"]
        lines.append(("    seconds per subject, median", f"{s['total']:.0f} s", f"prepare {s['prepare']:.0f}, train {s['train']:.0f}, sample {s['sample']:.0f}; "
                                                                              f"{results['threads']} threads"))
    if f := results.get("novelty"):
        lines.append(("6 novelty: distance to the nearest training person, median", f"{f['median_generated']:.3f}", f"held-out people {f['median_held_out']:.3f}"))
        lines.append(("    nearer than 0.3", f"{f['generated_below_0.3']:.1%}", f"held-out people {f['held_out_below_0.3']:.1%}"))
    return lines


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.maquette", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", type=Path, default=bases.MAQUETTE / "weights", help="the pipeline to measure")
    p.add_argument("--work", type=Path, default=Path("build/maquette"), help="work folder of models.maquette.pretrain, with data/ in it")
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--classifier", type=Path, help="default: WORK/attributes.safetensors, trained first if it is not there")
    p.add_argument("--samples", type=int, default=512, help="samples of figures 1 and 2 each")
    p.add_argument("--users-count", type=int, default=8, help="how many users are personalised")
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--skip", nargs="+", default=[], choices=FIGURES)
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if not (a.work / "data" / "rows.jsonl").exists():
        p.error(f"no crops in {a.work}: run `python -m models.maquette.pretrain prepare --data PORTRAITS.tar ... --work {a.work}` first")
    if not a.users.is_dir() and "personalisation" not in a.skip:
        p.error(f"no rendered users in {a.users}: name their folder with --users, or leave the figure out with --skip personalisation")
    if a.threads:
        torch.set_num_threads(a.threads)
    diffusers_logging.disable_progress_bar()         # loading takes a second; only our own slow parts have bars
    transformers_logging.disable_progress_bar()
    began = time.monotonic()
    crops, rows = data.load(a.work / "data")
    bench = Bench(bases.load("maquette", folder=a.weights), dlib_tools(), crops, rows, Cells(a.out / "cells"), a.steps, a.guidance)
    results = {"threads": torch.get_num_threads()} | measure(bench, a)
    results["seconds"] = round(time.monotonic() - began, 1)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "maquette.json").write_text(json.dumps(results, indent=1) + "\n")
    charts.draw(results, a.out)
    charts.contact_sheet(bench, a.out / "maquette-sheet.png")
    table = Table("figure", "value", "beside it", title=f"maquette {bench.base.ref.revision[:12]}: {results['unet_parameters_m']} M UNet, {results['weights_mb']} MB")
    for line in lines_of(results):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"numbers {a.out / 'maquette.json'}, plots and contact sheet beside it; {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
