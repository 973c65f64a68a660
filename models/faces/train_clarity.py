"""Train the network of `models.faces.clarity` on rendered portraits: about ten minutes on one core.

    python -m models.faces.train_clarity --work WORK        (the work folder of models.maquette.pretrain: its crops are read)

Half of the pictures are spoilt in one of many ways; the label says what was done, so it is exact.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from models.faces import align
from models.faces.clarity import QUESTIONS, SIDE_PX, WEIGHTS, ClarityNet, shrink
from models.maquette import data
from models.maquette.training import split

Picture = NDArray[np.uint8]
MIN_COVER = 0.15            # share of the face that a cover must hide to count; below MAX_STRAY it is none, between the two it is not used
MAX_STRAY = 0.03
FALSE_ALARMS = 0.001
# Real photos look a little more like drawings than renders do: of 226 photos of 22 people none is above 0.96 (docs/log.md, 2026-11-25)
LOWEST_LIMITS = {"covered": 0.9, "drawn": 0.975}


def inner_face(side: int) -> NDArray[np.bool_]:
    """(S, S): brow to chin of an aligned crop."""
    unit = side / align.TIGHT_SIDE_IOD
    mask = np.zeros((side, side), np.uint8)
    cv2.ellipse(mask, (side // 2, round(align.EYE_LINE_REL * side + 0.45 * unit)), (round(0.85 * unit), round(1.15 * unit)), 0, 0, 360, 1, -1)
    return mask.astype(bool)


# -- things before a face

def shape(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """(S, S) 0 or 255: a blob, a bar, a polygon, fingers, or the lower half of the face."""
    mask = np.zeros((side, side), np.uint8)
    centre = tuple(int(v) for v in rng.normal(side * 0.5, side * 0.13, 2))
    size = rng.uniform(0.1, 0.35, 2) * side
    kind = rng.integers(0, 6)
    if kind == 0:
        cv2.ellipse(mask, centre, (int(size[0]), int(size[1])), float(rng.uniform(0, 180)), 0, 360, 255, -1)
    elif kind == 1:
        corners = cv2.boxPoints((centre, (float(size[0] * 1.6), float(size[1] * 1.6)), float(rng.uniform(0, 180))))
        cv2.fillConvexPoly(mask, np.round(corners).astype(np.int32), 255)
    elif kind == 2:                                     # a polygon
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(4, 9)))
        radii = rng.uniform(0.12, 0.38, len(angles)) * side
        points = np.stack([centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)], 1)
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255)
    elif kind == 3:                                     # fingers, from the edge of the picture
        angle, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.09) * side
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        for finger in range(int(rng.integers(2, 6))):
            tip = np.array(centre) + across * (finger - 2) * width * 1.25 - along * rng.uniform(0, 0.1) * side
            cv2.line(mask, tuple(np.round(tip).astype(int).tolist()), tuple(np.round(tip + along * side).astype(int).tolist()), 255, max(2, round(width)))
    elif kind == 4:                                     # a mask over mouth and nose
        unit = side / align.TIGHT_SIDE_IOD
        eye = align.EYE_LINE_REL * side
        top, bottom, half = eye + rng.uniform(0.25, 0.6) * unit, eye + rng.uniform(1.4, 1.9) * unit, rng.uniform(0.8, 1.2) * unit
        points = np.array([[side / 2 - half, top], [side / 2, top - 0.15 * unit], [side / 2 + half, top], [side / 2 + 0.7 * half, bottom], [side / 2 - 0.7 * half, bottom]])
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255)
    else:                                               # a bar over the eyes
        y, half = align.EYE_LINE_REL * side, rng.uniform(0.03, 0.09) * side
        cv2.rectangle(mask, (round(side * rng.uniform(0.15, 0.32)), round(y - half)), (round(side * rng.uniform(0.68, 0.85)), round(y + half)), 255, -1)
    return mask


def stuff(rng: np.random.Generator, other: Picture) -> Picture:
    """What the cover is made of (S, S, 3): one colour, a shade, skin, noise, stripes, or a piece of another picture."""
    side = other.shape[0]
    colour = rng.integers(0, 256, 3).astype(np.float32)
    kind = rng.integers(0, 6)
    if kind == 1:
        ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        return np.broadcast_to(colour * (1 - ramp) + rng.integers(0, 256, 3) * ramp, other.shape).astype(np.uint8)
    if kind == 2:
        skin = np.array([1.0, rng.uniform(0.65, 0.85), rng.uniform(0.45, 0.75)]) * rng.uniform(60, 250)
        return np.clip(skin + rng.normal(0, 5, (side, side, 1)) + np.linspace(-25, 25, side)[None, :, None], 0, 255).astype(np.uint8)
    if kind == 3:
        return np.clip(colour + rng.normal(0, rng.uniform(5, 50), other.shape), 0, 255).astype(np.uint8)
    if kind == 4:
        wave = 0.5 + 0.5 * np.sin(np.arange(side) * rng.uniform(0.2, 1.5))[:, None, None]
        return np.asarray((colour * wave + rng.integers(0, 256, 3) * (1 - wave)).repeat(side, 1), np.uint8)
    if kind == 5:
        return np.asarray(np.roll(other[::-1], int(rng.integers(side)), 1), np.uint8)
    return np.broadcast_to(colour, other.shape).astype(np.uint8)


def cover(picture: Picture, other: Picture, rng: np.random.Generator) -> tuple[Picture, float]:
    """(picture with something before it, share of the inner face that is hidden)."""
    side = picture.shape[0]
    mask = shape(rng, side)
    hidden = float((mask[inner_face(side)] > 127).mean())
    soft = cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.3, 1.2)).astype(np.float32)[..., None] / 255
    return (picture * (1 - soft) + stuff(rng, other) * soft).astype(np.uint8), hidden


def unrecognisable(picture: Picture, rng: np.random.Generator) -> Picture:
    """The face as mosaic, or blurred within an ellipse."""
    side = picture.shape[0]
    cells = int(rng.integers(5, 13))                   # across the face: it is nearly half of the crop
    if rng.random() < 0.6:
        small = cv2.resize(picture, (cells * 2, cells * 2), interpolation=cv2.INTER_AREA)
        spoilt = cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST)
    else:
        spoilt = cv2.GaussianBlur(picture, (0, 0), side / rng.uniform(9, 16))
    mask = np.zeros((side, side), np.uint8)
    unit = side / align.TIGHT_SIDE_IOD
    middle = (side // 2, round(align.EYE_LINE_REL * side + 0.4 * unit))
    reach = (round(rng.uniform(0.9, 1.4) * unit), round(rng.uniform(1.2, 1.8) * unit))
    if rng.random() < 0.5:
        cv2.rectangle(mask, (middle[0] - reach[0], middle[1] - reach[1]), (middle[0] + reach[0], middle[1] + reach[1]), 1, -1)
    else:
        cv2.ellipse(mask, middle, reach, 0, 0, 360, 1, -1)
    return np.where(mask[..., None] > 0, spoilt, picture).astype(np.uint8)


def draw(picture: Picture, rng: np.random.Generator) -> Picture:
    """A drawing of a picture: edges, pencil, flat colours, or black and white only."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    kind = rng.integers(0, 4)
    if kind == 0:
        low = int(rng.integers(30, 90))
        made = cv2.Canny(grey, low, low * 2)
        made = made if rng.random() < 0.5 else 255 - made
    elif kind == 1:
        made = np.clip(grey.astype(np.float32) * 255 / (cv2.GaussianBlur(grey, (0, 0), rng.uniform(1.5, 6)).astype(np.float32) + 1), 0, 255).astype(np.uint8)
    elif kind == 2:
        levels = int(rng.integers(2, 5))
        flat = cv2.bilateralFilter(picture, 9, 80, 7)
        flat = (np.round(flat.astype(np.float32) / 255 * levels) / levels * 255).astype(np.uint8)
        lines = cv2.adaptiveThreshold(cv2.medianBlur(grey, 3), 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, 7, 4)
        return np.asarray(np.minimum(flat, lines[..., None]) if rng.random() < 0.7 else flat, np.uint8)
    else:
        made = np.where(grey > np.quantile(grey, rng.uniform(0.3, 0.7)), 255, 0).astype(np.uint8)
    return np.repeat(made[..., None], 3, 2)


def as_a_camera_would(picture: Picture, rng: np.random.Generator) -> Picture:
    """What differs between renders and photos, as far as it can be played: exposure, contrast, tint, softness, grain, JPEG, no colour."""
    x = picture.astype(np.float32)
    x = (x - 128) * rng.uniform(0.6, 1.3) + 128 + rng.uniform(-35, 35)
    x *= 1 + rng.uniform(-0.12, 0.12, 3)
    if rng.random() < 0.2:
        x = np.repeat(x.mean(2, keepdims=True), 3, 2)
    seen = np.clip(x + rng.normal(0, rng.uniform(0, 10), x.shape), 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        seen = np.asarray(cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.3, 1.6)), np.uint8)
    if rng.random() < 0.5:
        packed = cv2.imencode(".jpg", seen, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 95))])[1]
        seen = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR), np.uint8)
    if rng.random() < 0.5:
        seen = np.ascontiguousarray(seen[:, ::-1])
    turn = cv2.getRotationMatrix2D((seen.shape[1] / 2, seen.shape[0] / 2), float(rng.normal(0, 4)), float(rng.uniform(0.92, 1.1)))
    return np.asarray(cv2.warpAffine(seen, turn, (seen.shape[1], seen.shape[0]), borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def spoil(picture: Picture, other: Picture, rng: np.random.Generator) -> tuple[Picture, tuple[float, float]]:
    """(picture, (covered, drawn)): half are left alone, a few with something beside the face."""
    luck = rng.random()
    if luck < 0.3:
        for _ in range(8):
            covered, hidden = cover(picture, other, rng)
            if hidden >= MIN_COVER:
                return as_a_camera_would(covered, rng), (1.0, 0.0)
    elif luck < 0.38:
        return as_a_camera_would(unrecognisable(picture, rng), rng), (1.0, 0.0)
    elif luck < 0.5:
        return as_a_camera_would(draw(as_a_camera_would(picture, rng), rng), rng) if rng.random() < 0.5 else draw(picture, rng), (0.0, 1.0)
    elif luck < 0.65:
        for _ in range(8):
            beside, hidden = cover(picture, other, rng)
            if hidden <= MAX_STRAY:
                return as_a_camera_would(beside, rng), (0.0, 0.0)
    return as_a_camera_would(picture, rng), (0.0, 0.0)


def batch(crops: NDArray[np.uint8], numbers: NDArray[np.int64], rng: np.random.Generator, change: Callable[..., tuple[Picture, tuple[float, float]]] = spoil) -> tuple[Tensor, Tensor]:
    """(pictures (B, 3, 64, 64), truths (B, 2))."""
    # reduced first: spoilt at 128 px and reduced afterwards, it took beards and harsh light on real photos for covers (docs/log.md, 2026-11-25)
    made = [change(_small(crops[i]), _small(crops[rng.integers(len(crops))]), rng) for i in numbers]
    return shrink(np.stack([picture for picture, _ in made])), torch.tensor([truth for _, truth in made])


def _small(crop: Picture) -> Picture:
    return np.asarray(cv2.resize(crop, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA), np.uint8)


def train(work: Path, path: Path, *, steps: int, size: int = 64, learning_rate: float = 3e-3) -> dict[str, float]:
    """Train, set the limits on clean pictures of held-out people, write `path`; the shares of spoilt held-out pictures that are found."""
    crops, rows = data.load(work / "data")
    training, held = split(rows)
    torch.manual_seed(0)
    net = ClarityNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    bar = tqdm(range(steps), desc="clarity", unit="step", disable=None)
    for step in bar:
        rng = np.random.default_rng([7, step])
        x, truth = batch(crops, rng.choice(training, size), rng)
        loss = F.binary_cross_entropy_with_logits(net(x), truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    net.eval()
    with torch.no_grad():
        rng = np.random.default_rng(8)
        clean = torch.cat([net(batch(crops, held, rng, lambda p, o, r: (as_a_camera_would(p, r), (0.0, 0.0)))[0]).sigmoid() for _ in range(6)])
        x, truth = batch(crops, np.concatenate([held] * 4), rng)
        answers = torch.cat([net(part).sigmoid() for part in x.split(256)])
    limits = {q: max(LOWEST_LIMITS[q], float(torch.quantile(clean[:, i], 1 - FALSE_ALARMS))) for i, q in enumerate(QUESTIONS)}
    found = {q: float((answers[:, i][truth[:, i] == 1] > limits[q]).float().mean()) for i, q in enumerate(QUESTIONS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, path, {"limits": json.dumps(limits)})
    print(f"limits {limits}; of spoilt pictures of held-out people found {found}")
    return found


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, help="work folder of models.maquette.pretrain")
    p.add_argument("--out", type=Path, default=WEIGHTS)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    train(a.work, a.out, steps=a.steps)


if __name__ == "__main__":
    main()
