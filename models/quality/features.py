"""Are the eyes, the mouth and the rest of a face drawn as faces are? A small network of our own answers from an aligned crop, with a place.

Trained by `python -m models.quality.train_features` on rendered portraits, on the same portraits as the maquette's VAE gives them back, and on what the maquette
draws of nobody, half of them with a feature spoilt. What it says is no verdict: `models.quality.findings` holds it against what it says of clean pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("features.safetensors")
KINDS = ("eyes", "mouth", "melted")
CROP_PX = 128                        # side of the aligned crop that is read
LEFT_PX, TOP_PX = 32, 32             # the window within it, brow to chin: 64 wide, 72 high
WIDTH_PX, HEIGHT_PX = 64, 72
CELL_PX = 8                          # one answer for each cell of this side


class FeaturesNet(nn.Module):
    """(B, 3, 72, 64) in [-1, 1] -> logits (B, 3, 9, 8): in this cell an eye, the mouth, or any part of the face is spoilt. 0.2M parameters.

    A face is alike on both sides, so half-way each place also sees the place opposite.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

        self.near = nn.Sequential(*block(3, 16, 1), *block(16, 32, 2), *block(32, 32, 1), *block(32, 64, 2), *block(64, 64, 1))
        self.place = nn.Parameter(torch.zeros(64, HEIGHT_PX // 4, WIDTH_PX // 4))       # the crop is aligned, so where something is matters
        self.far = nn.Sequential(*block(128, 64, 2), *block(64, 64, 1))
        self.whole = nn.Linear(64, 64)
        self.head = nn.Conv2d(64, len(KINDS), 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        near = self.near(x_BCHW) + self.place
        far = self.far(torch.cat([near, near.flip(3)], 1))
        far = F.relu(far + self.whole(far.mean((2, 3)))[:, :, None, None])
        logits: Tensor = self.head(F.dropout(far, 0.1, self.training))
        return logits


@dataclass(frozen=True)
class Features:
    """What the network says of one crop: for each kind the strongest logit, and the corners of its cells in the crop (left, top, right, bottom), pixels."""

    logits: dict[str, float]
    boxes_px: dict[str, tuple[float, float, float, float]]


class FeatureReader:
    """The shipped network, read on first use."""

    @cached_property
    def _net(self) -> FeaturesNet:
        net = FeaturesNet()
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()})
        return net.eval().requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """sha256 of the network."""
        return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()

    def read(self, crop: NDArray[np.uint8]) -> Features:
        """Look at one aligned crop (128, 128, 3), RGB.

        Raises:
            ValueError: a crop of another size.
        """
        if crop.shape != (CROP_PX, CROP_PX, 3):
            raise ValueError(f"an aligned crop of {CROP_PX} x {CROP_PX} RGB pixels is needed, got shape {crop.shape}")
        with torch.no_grad():
            maps = self._net(window(crop[None]))[0].numpy()
        return Features({kind: float(map_HW.max()) for kind, map_HW in zip(KINDS, maps, strict=True)},
                        {kind: _box(map_HW) for kind, map_HW in zip(KINDS, maps, strict=True)})


@cache
def reader() -> FeatureReader:
    """The one of this process."""
    return FeatureReader()


def window(crops_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (B, 128, 128, 3) -> (B, 3, 72, 64) in [-1, 1]: what the network sees of aligned crops."""
    seen = np.ascontiguousarray(crops_BHWC[:, TOP_PX:TOP_PX + HEIGHT_PX, LEFT_PX:LEFT_PX + WIDTH_PX])
    return torch.from_numpy(seen).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _box(map_HW: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Around the cells that are at least half as sure as the surest, joined with it."""
    chance = 1 / (1 + np.exp(-map_HW.astype(np.float64)))
    sure = chance >= chance.max() / 2
    row, column = np.unravel_index(int(chance.argmax()), chance.shape)
    joined = np.zeros_like(sure)
    joined[row, column] = True
    for _ in range(sure.size):                                       # flood fill: 72 cells at most
        grown = joined | (_grown(joined) & sure)
        if (grown == joined).all():
            break
        joined = grown
    rows, columns = np.nonzero(joined)
    return (float(LEFT_PX + CELL_PX * columns.min()), float(TOP_PX + CELL_PX * rows.min()),
            float(LEFT_PX + CELL_PX * (columns.max() + 1)), float(TOP_PX + CELL_PX * (rows.max() + 1)))


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
