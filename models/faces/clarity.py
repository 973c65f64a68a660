"""Is this face plainly to be seen, and is this a photograph? A small network of our own answers both from an aligned crop.

Trained by `python -m models.faces.train_clarity` on rendered portraits with things held before them, faces made unrecognisable, and
drawings made of them; glasses, sunglasses, hats and beards are no cover. How it does on real photos: docs/faces.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("clarity.safetensors")
SIDE_PX = 64
QUESTIONS = ("covered", "drawn")


class ClarityNet(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> logits (B, 2): something covers the face; this is no photograph. 0.26M parameters."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

        self.trunk = nn.Sequential(*block(3, 24, 1), *block(24, 48, 2), *block(48, 64, 2), *block(64, 96, 2), *block(96, 128, 1))
        # the face lies in the middle of the crop, so where something is matters: a 4 x 4 grid is kept
        self.head = nn.Linear(16 * 128, len(QUESTIONS))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(F.adaptive_avg_pool2d(self.trunk(x_BCHW), (4, 4)).flatten(1), 0.2, self.training))
        return logits


@dataclass(frozen=True)
class Clarity:
    """What the network says of one crop: probabilities."""

    covered: float
    drawn: float


class ClarityReader:
    """The shipped network, read on first use."""

    @cached_property
    def _net(self) -> ClarityNet:
        net = ClarityNet()
        net.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
        return net.eval().requires_grad_(False)

    @cached_property
    def digest(self) -> str:
        """sha256 of the network, limits included."""
        return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()

    @cached_property
    def limits(self) -> Clarity:
        """Probabilities above which the answer is yes: no clean photo that we have exceeds them, and one in a thousand renders at most."""
        with safe_open(WEIGHTS, "pt") as file:
            return Clarity(**json.loads(file.metadata()["limits"]))

    def read(self, crop: NDArray[np.uint8]) -> Clarity:
        """Look at one aligned crop (S, S, 3), RGB."""
        with torch.no_grad():
            covered, drawn = self._net(shrink(crop[None])).sigmoid()[0].tolist()
        return Clarity(covered, drawn)


def shrink(crops_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (B, S, S, 3) -> (B, 3, 64, 64) in [-1, 1], by area."""
    x = torch.from_numpy(np.ascontiguousarray(crops_BHWC)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x if x.shape[-1] == SIDE_PX else F.interpolate(x, (SIDE_PX, SIDE_PX), mode="area")
