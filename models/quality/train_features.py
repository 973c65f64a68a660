"""Train the network of `models.quality.features`: a quarter of an hour of one core for the pictures, and ten minutes for each 1,500 steps.

    python -m models.quality.train_features --data PORTRAITS.tar ... --work WORK

Clean pictures: photos of rendered people, the same as the maquette's VAE gives them back, and what the maquette draws of nobody in particular. Half of them are
spoilt in one of many ways; the label says what was done where, so it is exact. Spoiling is done here, on aligned crops, by other code than
the bench plants defects with (`models.quality.planting`), so that the bench does not ask what was taught.

Left out of the training: the people that limits are measured on (`models.quality.usual`: the first of each tar), the class pictures, and reserved users.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from models.diffusion import bases
from models.diffusion.sampler import sample
from models.faces import align
from models.faces.face import Picture
from models.maquette import data
from models.quality.features import CELL_PX, CROP_PX, HEIGHT_PX, KINDS, LEFT_PX, TOP_PX, WEIGHTS, WIDTH_PX, FeaturesNet, window
from models.quality.usual import PEOPLE

UNIT = CROP_PX / align.TIGHT_SIDE_IOD                # one eye distance in the crop
EYE_ROW = align.EYE_LINE_REL * CROP_PX
EYES = ((-0.5, 0.0), (0.5, 0.0))                     # in eye distances from the middle of the eyes, as in `align.FACE_TEMPLATE`
MOUTH = (0.0, 1.12)
SEEN, UNSEEN = 5.0, 1.0                              # mean change of a cell, in grey levels: from SEEN on it is spoilt, up to UNSEEN it is not, between them nobody asks
RECONSTRUCTED, DRAWN = 2400, 384                     # pictures from the maquette's VAE, and of nobody
DRAWN_FROM = 700_000                                 # their seeds: no bench draws with these
PROMPTS = ("a photo of a {}", "a photo of a {} smiling", "a close-up photo of a {}", "a photo of a {} wearing a blue shirt", "a photo of a {} in a forest",
           "a photo of a young {}", "a photo of an old {}", "a photo of a {} with a neutral expression")
FORGIVEN = -1.0                                      # label of a cell that nobody asks about

Rng = np.random.Generator
Mask = NDArray[np.float32]


# -- ways to spoil a place of a crop: centre and half sizes in pixels of the crop

@dataclass(frozen=True)
class Spot:
    """Where: centre (x, y) and half size (x, y), pixels."""

    at: tuple[float, float]
    reach: tuple[float, float]

    def mask(self, shape: tuple[int, ...], *, edge_px: float = 1.0) -> Mask:
        """(S, S, 1) in [0, 1]: the ellipse, with a soft edge."""
        y, x = np.mgrid[:shape[0], :shape[1]].astype(np.float32)
        inside = 1 - np.hypot((x - self.at[0]) / self.reach[0], (y - self.at[1]) / self.reach[1])
        return np.asarray(np.clip(inside * min(self.reach) / edge_px + 0.5, 0, 1), np.float32)[..., None]


def _put(under: Picture, over: NDArray[Any], mask: Mask) -> Picture:
    return np.asarray(np.clip(under * (1 - mask) + over * mask, 0, 255).round(), np.uint8)


def _warped(crop: Picture, matrix: NDArray[np.float64]) -> Picture:
    return np.asarray(cv2.warpAffine(crop, matrix, (crop.shape[1], crop.shape[0]), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def _about(spot: Spot, linear: NDArray[np.float64], shift: tuple[float, float] = (0.0, 0.0)) -> NDArray[np.float64]:
    """(2, 3): a linear map about the middle of the spot, then a shift."""
    centre = np.array(spot.at)
    return np.hstack([linear, (centre + np.array(shift) - linear @ centre)[:, None]])


def erase(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Skin from beside it, or drawn in from its edge."""
    if rng.random() < 0.5:
        hole = (spot.mask(crop.shape)[..., 0] > 0.3).astype(np.uint8)
        flat = np.asarray(cv2.inpaint(np.ascontiguousarray(crop), hole, 3, cv2.INPAINT_TELEA if rng.random() < 0.5 else cv2.INPAINT_NS), np.uint8)
        grain = rng.normal(0, rng.uniform(0, 3), crop.shape)
        return _put(crop, flat + grain, spot.mask(crop.shape))
    return _put(crop, _warped(crop, np.array([[1.0, 0, rng.uniform(-0.1, 0.1) * UNIT], [0, 1.0, -rng.uniform(0.5, 0.8) * UNIT]])), spot.mask(crop.shape, edge_px=3))


def move(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Elsewhere, up to half an eye distance away, skin where it was."""
    turn, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.16, 0.5) * UNIT
    return _again(erase(crop, spot, other, rng), crop, spot, (far * math.cos(turn), far * math.sin(turn)))


def double(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """A second one beside, above or below it, or farther off on the face."""
    turn, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 0.9) * UNIT
    return _again(crop, crop, spot, (far * math.cos(turn), far * math.sin(turn)))


def _again(under: Picture, crop: Picture, spot: Spot, shift: tuple[float, float]) -> Picture:
    there = Spot((spot.at[0] + shift[0], spot.at[1] + shift[1]), spot.reach)
    return _put(under, _warped(crop, np.array([[1.0, 0, shift[0]], [0, 1.0, shift[1]]])), there.mask(crop.shape))


def flip(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Upside down, or left to right."""
    return _put(crop, _warped(crop, _about(spot, np.diag([1.0, -1.0] if rng.random() < 0.5 else [-1.0, 1.0]))), spot.mask(crop.shape))


def turn(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Rotated by 20 to 180 degrees."""
    angle = math.radians(rng.uniform(20, 180)) * rng.choice([-1, 1])
    return _put(crop, _warped(crop, _about(spot, np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))), spot.mask(crop.shape))


def resize(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Half as large again and more, or much smaller."""
    scale = rng.uniform(1.35, 2.2) if rng.random() < 0.7 else rng.uniform(0.4, 0.7)
    where = Spot(spot.at, (spot.reach[0] * max(1.0, 0.85 * scale), spot.reach[1] * max(1.0, 0.85 * scale)))
    return _put(crop, _warped(crop, _about(spot, np.eye(2) * scale)), where.mask(crop.shape))


def smear(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Blurred, alike or along one way."""
    if rng.random() < 0.5:
        soft = cv2.GaussianBlur(crop, (0, 0), rng.uniform(0.08, 0.25) * UNIT)
    else:
        length, angle = rng.uniform(0.3, 0.9) * UNIT, rng.uniform(0, math.pi)
        kernel = np.zeros((31, 31), np.float32)
        cv2.line(kernel, (round(15 - length / 2 * math.cos(angle)), round(15 - length / 2 * math.sin(angle))),
                 (round(15 + length / 2 * math.cos(angle)), round(15 + length / 2 * math.sin(angle))), 1.0)
        soft = cv2.filter2D(crop, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    return _put(crop, soft, spot.mask(crop.shape, edge_px=2))


def swirl(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Wrung about its middle."""
    y, x = np.mgrid[:crop.shape[0], :crop.shape[1]].astype(np.float32)
    dx, dy = x - spot.at[0], y - spot.at[1]
    near = np.clip(1 - np.hypot(dx / spot.reach[0], dy / spot.reach[1]), 0, 1)
    angle = rng.choice([-1, 1]) * rng.uniform(1.2, 6.0) * near ** rng.uniform(0.8, 1.6)
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(cv2.remap(crop, (spot.at[0] + c * dx - s * dy).astype(np.float32), (spot.at[1] + s * dx + c * dy).astype(np.float32), cv2.INTER_LINEAR,
                                borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def ripple(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """Displaced at random, smoothly."""
    y, x = np.mgrid[:crop.shape[0], :crop.shape[1]].astype(np.float32)
    moved = []
    for _ in range(2):
        field = cv2.GaussianBlur(rng.normal(0, 1, crop.shape[:2]).astype(np.float32), (0, 0), rng.uniform(0.08, 0.25) * UNIT)
        moved.append(field / (np.abs(field).max() + 1e-6) * rng.uniform(0.12, 0.4) * UNIT * spot.mask(crop.shape, edge_px=4)[..., 0])
    return np.asarray(cv2.remap(crop, x + moved[0], y + moved[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def swap(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """The place of another face, a little off, in the colours of this one."""
    shift = rng.uniform(-0.3, 0.3, 2) * UNIT
    lent = _warped(other, np.array([[1.0, 0, shift[0]], [0, 1.0, shift[1]]])).astype(np.float32)
    mask = spot.mask(crop.shape, edge_px=2)
    inside = mask[..., 0] > 0.5
    if inside.any():
        lent = (lent - lent[inside].mean(0)) / (lent[inside].std() + 1) * (crop[inside].std() + 1) + crop[inside].mean(0)
    return _put(crop, lent, mask)


def squint(crop: Picture, spot: Spot, other: Picture, rng: Rng) -> Picture:
    """The iris a sixth of an eye distance aside."""
    iris = Spot(spot.at, (0.14 * UNIT, 0.13 * UNIT))
    return _again(crop, crop, iris, (rng.choice([-1, 1]) * rng.uniform(0.12, 0.22) * UNIT, rng.uniform(-0.05, 0.05) * UNIT))


Way = Callable[[Picture, Spot, Picture, Rng], Picture]
OF_EYES: tuple[Way, ...] = (erase, erase, move, move, flip, flip, turn, resize, resize, smear, swirl, squint, double)
OF_MOUTH: tuple[Way, ...] = (erase, move, move, flip, turn, resize, smear, smear, swirl, ripple, double, double)
OF_ANY: tuple[Way, ...] = (swirl, swirl, swirl, ripple, ripple, smear, smear, flip, swap, turn)


def _spot(place: tuple[float, float], reach: tuple[float, float], rng: Rng) -> Spot:
    x, y = place[0] + rng.normal(0, 0.03), place[1] + rng.normal(0, 0.03)
    size = rng.uniform(0.85, 1.2, 2)
    return Spot((CROP_PX / 2 + x * UNIT, EYE_ROW + y * UNIT), (reach[0] * size[0] * UNIT, reach[1] * size[1] * UNIT))


def spoil(crop: Picture, other: Picture, rng: Rng) -> tuple[Picture, int | None]:
    """(crop (128, 128, 3) with one thing spoilt, number of its kind); half of them as they are, with None."""
    luck = rng.random()
    if luck < 0.5:
        return crop, None
    if luck < 0.7:
        way = OF_EYES[rng.integers(len(OF_EYES))]
        chosen = [e for e in EYES if rng.random() < 0.5] or [EYES[rng.integers(2)]]
        for eye in chosen:
            crop = way(crop, _spot(eye, (0.34, 0.21), rng), other, rng)
        return crop, 0
    if luck < 0.83:
        return OF_MOUTH[rng.integers(len(OF_MOUTH))](crop, _spot(MOUTH, (0.48, 0.26), rng), other, rng), 1
    if rng.random() < 0.3:                                           # a feature once more, elsewhere on the face
        at, to = ((*EYES, MOUTH)[rng.integers(3)], (rng.uniform(-0.6, 0.6), rng.choice([-0.5, 0.55, 0.7, 1.5]) + rng.normal(0, 0.08)))
        spot = _spot(at, (0.34, 0.2) if at != MOUTH else (0.45, 0.22), rng)
        return _again(crop, crop, spot, ((to[0] - at[0]) * UNIT, (to[1] - at[1]) * UNIT)), 2
    radius = rng.uniform(0.3, 0.9)
    spot = _spot((rng.uniform(-0.6, 0.6), rng.uniform(-0.45, 1.4)), (radius, radius * rng.uniform(0.7, 1.3)), rng)
    return OF_ANY[rng.integers(len(OF_ANY))](crop, spot, other, rng), 2


def labels(clean: Picture, spoilt: Picture, kind: int | None) -> NDArray[np.float32]:
    """(3, 9, 8): 1 where the kind is seen, 0 where nothing was done, FORGIVEN where it is hard to say or another kind was spoilt."""
    truth = np.zeros((len(KINDS), HEIGHT_PX // CELL_PX, WIDTH_PX // CELL_PX), np.float32)
    if kind is None:
        return truth
    change = np.abs(clean.astype(np.float32) - spoilt).mean(2)[TOP_PX:TOP_PX + HEIGHT_PX, LEFT_PX:LEFT_PX + WIDTH_PX]
    cells = change.reshape(truth.shape[1], CELL_PX, truth.shape[2], CELL_PX).mean((1, 3))
    truth[:, cells > UNSEEN] = FORGIVEN
    truth[kind, cells > SEEN] = 1
    return truth


def as_drawn(crop: Picture, rng: Rng) -> tuple[Picture, NDArray[np.float64]]:
    """What differs between pictures and is no defect: exposure, tint, softness, grain, JPEG; and a little of how it is aligned, returned as (2, 3) for the twin."""
    x = (crop.astype(np.float32) - 128) * rng.uniform(0.65, 1.25) + 128 + rng.uniform(-30, 30)
    x = x * (1 + rng.uniform(-0.1, 0.1, 3))
    if rng.random() < 0.15:
        x = np.repeat(x.mean(2, keepdims=True), 3, 2)
    seen = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        seen = np.asarray(cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.3, 1.1)), np.uint8)
    if rng.random() < 0.5:
        seen = np.clip(seen + rng.normal(0, rng.uniform(0, 7), seen.shape), 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        packed = cv2.imencode(".jpg", seen, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))])[1]
        seen = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR), np.uint8)
    middle = (CROP_PX / 2, EYE_ROW + 0.5 * UNIT)
    frame = np.asarray(cv2.getRotationMatrix2D(middle, float(rng.normal(0, 3)), float(rng.uniform(0.93, 1.08))), np.float64)
    frame[:, 2] += rng.normal(0, 1.2, 2)
    return seen, frame


def example(crops: NDArray[np.uint8], number: int, rng: Rng) -> tuple[Picture, NDArray[np.float32]]:
    """One picture to learn from, and its labels."""
    clean, other = (np.ascontiguousarray(crops[n][:, ::-1] if rng.random() < 0.5 else crops[n]) for n in (number, int(rng.integers(len(crops)))))
    spoilt, kind = spoil(clean, other, rng)
    seen, frame = as_drawn(spoilt, rng)
    truth = labels(_warped(clean, frame), _warped(spoilt, frame), kind)
    return _warped(seen, frame), truth


# -- the clean pictures

def people(sources: list[Path], work: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Crops (N, 128, 128, 3) of photos to train on, and of the people that limits are measured on."""
    data.prepare(sources, work / "data", side_px=CROP_PX)
    crops, rows = data.load(work / "data")
    kept: set[str] = set()
    for source in sources:
        seen = list(dict.fromkeys(str(row["identity"]) for row, _ in data.read_pictures(source)))
        kept |= {*seen[:PEOPLE // len(sources) + 1]}
    photos = [n for n, row in enumerate(rows) if row["style"] != "painting"]
    return (np.stack([crops[n] for n in photos if rows[n]["identity"] not in kept]), np.stack([crops[n] for n in photos if rows[n]["identity"] in kept]))


def of_the_maquette(crops: NDArray[np.uint8], work: Path) -> NDArray[np.uint8]:
    """(RECONSTRUCTED + DRAWN, 128, 128, 3): crops through its VAE, and what it draws of nobody; made once."""
    path = work / "features-maquette.npy"
    if not path.exists():
        base = bases.load("maquette")
        chosen = np.random.default_rng(5).permutation(len(crops))[:RECONSTRUCTED]
        back = []
        with torch.no_grad():
            for start in tqdm(range(0, len(chosen), 16), desc="VAE", unit="16 pictures", disable=None):
                x = torch.from_numpy(crops[np.sort(chosen[start:start + 16])]).permute(0, 3, 1, 2).float() / 127.5 - 1
                y = base.pipe.vae.decode(base.pipe.vae.encode(x).latent_dist.mean).sample
                back.append(((y + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
        wanted = [(PROMPTS[n // 2 % len(PROMPTS)].format(("man", "woman")[n % 2]), DRAWN_FROM + n) for n in range(DRAWN)]
        bar = tqdm(total=DRAWN, desc="samples", unit="sample", disable=None)
        drawn = sample(base, [p for p, _ in wanted], [s for _, s in wanted], progress=lambda done, of: bar.update(done - bar.n))
        np.save(path, np.concatenate([*back, drawn]))
    made: NDArray[np.uint8] = np.load(path)
    return made


def batches(renders: NDArray[np.uint8], maquette: NDArray[np.uint8], *, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(pictures (B, 3, 72, 64), labels (B, 3, 9, 8)): half renders, a quarter from the VAE, a quarter drawn."""
    for step in range(steps):
        rng = np.random.default_rng([11, step])
        made = []
        for place in range(size):
            if place % 4 < 2:
                made.append(example(renders, int(rng.integers(len(renders))), rng))
            elif place % 4 == 2:
                made.append(example(maquette[:RECONSTRUCTED], int(rng.integers(RECONSTRUCTED)), rng))
            else:
                made.append(example(maquette[RECONSTRUCTED:], int(rng.integers(DRAWN)), rng))
        yield window(np.stack([p for p, _ in made])), torch.from_numpy(np.stack([t for _, t in made]))


def loss(logits_BKHW: Tensor, truth_BKHW: Tensor) -> Tensor:
    """Cross entropy of the cells that are asked about, and of the strongest cell of each kind: what a finding is made of."""
    asked = truth_BKHW >= 0
    cells = F.binary_cross_entropy_with_logits(logits_BKHW[asked], truth_BKHW[asked], pos_weight=torch.tensor(3.0))
    top = logits_BKHW.flatten(2).logsumexp(2) - math.log(4)
    spoilt = truth_BKHW.flatten(2).amax(2)
    clean = (truth_BKHW.flatten(2) == 0).all(2)
    known = (spoilt == 1) | clean
    return cells + F.binary_cross_entropy_with_logits(top[known], spoilt[known])


def train(sources: list[Path], work: Path, path: Path, *, steps: int, size: int = 64, learning_rate: float = 4e-3) -> None:
    """Train and write `path`; prints the share of spoilt pictures of held-out people beyond 1 % of the clean ones."""
    renders, held = people(sources, work)
    maquette = of_the_maquette(renders, work)
    torch.manual_seed(0)
    net = FeaturesNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    bar = tqdm(batches(renders, maquette, steps=steps, size=size), desc="features", unit="step", total=steps, disable=None)
    for step, (pictures, truth) in enumerate(bar):
        value = loss(net(pictures.contiguous(memory_format=torch.channels_last)), truth)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")              # the only host sync
            print(step, f"{value.item():.3f}", flush=True)
    net = net.to(memory_format=torch.contiguous_format)
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}, path)
    print(found(net.eval(), held))


@torch.no_grad()
def found(net: FeaturesNet, crops: NDArray[np.uint8]) -> dict[str, float]:
    """For each kind, the share of spoilt crops whose strongest cell is beyond that of 99 % of clean ones."""
    rng = np.random.default_rng(3)
    seen: dict[int | None, list[NDArray[np.float32]]] = {None: [], 0: [], 1: [], 2: []}
    for number in range(len(crops)):
        for _ in range(2):
            spoilt, kind = spoil(crops[number], crops[int(rng.integers(len(crops)))], rng)
            seen[kind].append(net(window(spoilt[None]))[0].flatten(1).amax(1).numpy())
    limits = np.quantile(np.stack(seen[None]), 0.99, axis=0)
    return {kind: round(float((np.stack(seen[n])[:, n] > limits[n]).mean()), 3) for n, kind in enumerate(KINDS)}


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m models.quality.train_features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="+", required=True, help="tars of rendered portraits")
    p.add_argument("--work", type=Path, required=True, help="folder for crops and pictures of the maquette, made once")
    p.add_argument("--out", type=Path, default=WEIGHTS)
    p.add_argument("--steps", type=int, default=900, help="those that ship had 900, which are too few: docs/log.md")
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    cv2.setNumThreads(1)
    train(a.data, a.work, a.out, steps=a.steps)


if __name__ == "__main__":
    main()
