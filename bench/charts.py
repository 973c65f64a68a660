"""Plots and the contact sheet of `make bench-maquette`, and the plot of `make bench-methods`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench.drawing import Bench

mpl.use("Agg")

from matplotlib import pyplot as plt

COLUMNS = 16
TILE_PX = 96


def draw(results: dict[str, Any], out: Path) -> None:
    """Write `maquette-identity.png`, `maquette-slots.png`, `maquette-novelty.png` for the figures that were measured."""
    if f := results.get("personalisation"):
        figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
        for axis, key, title in ((axes[0], "personalised", "personalised"), (axes[1], "base_alone", "base alone")):
            s = f[key]
            bins = np.linspace(0.1, 1.1, 51)
            axis.hist(s["impostor"], bins, density=True, alpha=0.5, label="to impostors' witnesses")
            axis.hist(s["genuine"], bins, density=True, alpha=0.5, label="to their own witnesses")
            axis.axvline(s["threshold"], color="k", linestyle=":", label="1 % false accepts")
            axis.set_title(f"{title}: AUC {s['auc'] or float('nan'):.3f}, true accepts {s['true_accepts']:.0%}")
            axis.legend()
        axes[1].set_xlabel("dlib distance of a sample")
        _save(figure, out / "maquette-identity.png")
    if f := results.get("adherence"):
        slots = list(f["agreed"])
        figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
        x = np.arange(len(slots))
        bars = [("samples agree with their prompt", f["agreed"]), ("classifier on held-out renders", f["classifier_on_held_out_renders"]), ("by chance", f["chance"])]
        if clip := results.get("clip"):
            bars.insert(2, ("CLIP zero-shot on held-out renders", clip["accuracy"]))
        for i, (label, values) in enumerate(bars):
            axis.bar(x + 0.2 * i, [values[s] for s in slots], 0.2, label=label)
        axis.set_xticks(x + 0.3, slots, rotation=20)
        axis.set_ylim(0, 1)
        figure.legend(fontsize=8, loc="outside upper center", ncols=4)
        _save(figure, out / "maquette-slots.png")
    if f := results.get("novelty"):
        figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
        bins = np.linspace(0, 0.8, 41)
        axis.hist(f["distances"]["generated"], bins, density=True, alpha=0.5, label="generated faces")
        axis.hist(f["distances"]["held_out"], bins, density=True, alpha=0.5, label="held-out people")
        axis.set_xlabel("dlib distance to the nearest training person")
        axis.legend()
        _save(figure, out / "maquette-novelty.png")


def plane(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Identity against editability, a point for each row with its name; "NAME at STEP" of one name are joined in the order of steps, with their steps."""
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    families: dict[str, list[tuple[float, float, str]]] = {}
    for name, row in rows.items():
        family, _, at = name.partition(" at ")
        families.setdefault(family, []).append((row["editability"], row["auc"], at))
    joined = any(len(points) > 1 for points in families.values())
    for number, (family, points) in enumerate(families.items()):
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=family, color=plt.get_cmap("tab20")(number % 20))
        for x, y, at in points:
            right = not joined and x > sum(p[0][0] for p in families.values()) / len(families)
            axis.annotate(at if joined else family, (x, y), fontsize=8, xytext=(-5 if right else 5, 4 - 12 * (number % 2) * (not joined)), textcoords="offset points", ha="right" if right else "left")
    axis.set_xlabel("editability: slots that contradict the portraits, seen")
    axis.set_ylabel("identity: AUC")
    if joined:
        axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def contact_sheet(bench: Bench, path: Path) -> None:
    """Write one picture of everything: plain samples, full prompts, failures, reconstructions, and each user's photos beside their samples."""
    bands: list[NDArray[np.uint8]] = []
    p = bench.pictures
    for key, title in (("plain", "1: plain samples"), ("faceless", "1: samples without exactly one face"), ("full", "2: full prompts"),
                       ("vae", "4: held-out renders, then their reconstructions")):
        if len(p.get(key, [])):
            bands += [_title(title), *_rows(p[key], 8 if key == "vae" else COLUMNS)]
    for user, images in p.get("users", []):
        bands += [_title(f"5: user {user.name} ({user.noun}): photos trained on, then samples"), *_rows(user.crops), *_rows(images)]
    if bands:
        Image.fromarray(np.concatenate(bands)).save(path)


def _title(words: str) -> NDArray[np.uint8]:
    strip = Image.new("RGB", (COLUMNS * TILE_PX, 18), "white")
    ImageDraw.Draw(strip).text((4, 3), words, fill="black")
    return np.asarray(strip)


def _rows(images: NDArray[np.uint8], columns: int = COLUMNS) -> list[NDArray[np.uint8]]:
    rows = []
    for start in range(0, len(images), columns):
        row = np.full((TILE_PX, COLUMNS * TILE_PX, 3), 255, np.uint8)
        for i, image in enumerate(images[start:start + columns]):
            row[:, i * TILE_PX:(i + 1) * TILE_PX] = cv2.resize(image, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
        rows.append(row)
    return rows
