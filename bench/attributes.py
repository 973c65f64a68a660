"""The attribute classifier of `make bench-maquette`: a small network, trained on renders alone, that says what a portrait shows.

It shares nothing with the maquette (its weights, its CLIP, its tokenizer), so when it agrees with a prompt, the picture agrees with it.

    python -m bench.attributes --work build/maquette
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.maquette import data
from models.maquette.training import split
from models.maquette.vocabulary import SLOTS

JUDGED = ("style", "hair_colour", "garment", "colour", "eyewear", "hat", "place", "light", "expression")
SIDE_PX = 64           # half the crop: glasses and hats are plain at 64 px, and an epoch takes a quarter of the time
VALUES = {slot: tuple(SLOTS[slot].phrases) for slot in JUDGED}


class AttributeNet(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> logits per slot (B, values). About 0.27M parameters, 23M multiplications a picture."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]

        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
                                   *block(32, 48, 2), *block(48, 64, 1), *block(64, 96, 2), *block(96, 128, 1))
        # garments are at the bottom, hats at the top, so height is kept; left and right are alike
        self.heads = nn.ModuleDict({slot: nn.Linear(4 * 128, len(values)) for slot, values in VALUES.items()})

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        x = F.dropout(F.adaptive_avg_pool2d(self.trunk(x_BCHW), (4, 1)).flatten(1), 0.2, self.training)
        return {slot: head(x) for slot, head in self.heads.items()}


def shrink(images_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (B, S, S, 3) -> (B, 3, 64, 64) in [-1, 1], by area."""
    x = torch.from_numpy(np.array(images_BHWC)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x if x.shape[-1] == SIDE_PX else F.interpolate(x, (SIDE_PX, SIDE_PX), mode="area")


def labels(rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """Per slot, the number of each row's value (B); -1 where it has none, or none that can be seen."""
    found = {}
    for slot, values in VALUES.items():
        place = {value: i for i, value in enumerate(values)}
        grey = slot in ("colour", "hair_colour")      # no colour can be seen in a black and white photo
        found[slot] = torch.tensor([-1 if grey and r["style"] == "black and white" else place.get(r[slot], -1) for r in rows])
    return found


def _augment(x_BCHW: Tensor, g: torch.Generator) -> Tensor:
    """Mirror, shift, brightness, and blur on half of the batch: what a generator draws is softer than a render."""
    if torch.rand((), generator=g) < 0.5:
        x_BCHW = x_BCHW.flip(3)
    dy, dx = (int(v) for v in torch.randint(-3, 4, (2,), generator=g))
    x = torch.roll(x_BCHW, (dy, dx), (2, 3))
    x = x * (0.9 + 0.2 * torch.rand((len(x), 1, 1, 1), generator=g)) + 0.1 * (torch.rand((len(x), 1, 1, 1), generator=g) - 0.5)
    half = len(x) // 2
    soft = F.interpolate(F.avg_pool2d(x[:half], 2), scale_factor=2, mode="bilinear", align_corners=False)
    return torch.cat([soft, x[half:]]) + 0.03 * torch.randn(x.shape, generator=g)


def train(work: Path, path: Path, *, epochs: int = 8, batch: int = 64, learning_rate: float = 3e-3) -> dict[str, float]:
    """Train on the training identities, measure on the held-out ones, write `path`; returns the held-out accuracy per slot."""
    crops, rows = data.load(work / "data")
    training, held = split(rows)
    pictures = torch.cat([shrink(crops[i:i + 512]) for i in range(0, len(rows), 512)])
    truth = labels(rows)
    torch.manual_seed(0)
    net = AttributeNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.02)
    steps = epochs * (len(training) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    g = torch.Generator().manual_seed(0)
    began = time.monotonic()
    for epoch in range(epochs):
        net.train()
        order = torch.from_numpy(training)[torch.randperm(len(training), generator=g)]
        total = 0.0
        for chosen in order.split(batch)[: len(training) // batch]:
            logits = net(_augment(pictures[chosen], g))
            loss = torch.stack([F.cross_entropy(logits[s], truth[s][chosen], ignore_index=-1, label_smoothing=0.03) for s in JUDGED]).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            total += float(loss.detach())
        print(f"attributes: epoch {epoch + 1} of {epochs}, loss {total / (len(training) // batch):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    net.eval()
    right = accuracy(predict(net, np.asarray(crops[held])), [rows[i] for i in held])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path, {"values": json.dumps(VALUES), "held_out_accuracy": json.dumps(right), "pictures": str(len(training))})
    return right


def load(path: Path) -> tuple[AttributeNet, dict[str, float]]:
    """The classifier and its held-out accuracy per slot.

    Raises:
        ValueError: if it was trained for other slots or values.
    """
    with safe_open(path, "pt") as file:
        header = file.metadata()
    if json.loads(header["values"]) != {slot: list(values) for slot, values in VALUES.items()}:
        raise ValueError(f"{path.name} knows another vocabulary: delete it, and the next run trains it anew")
    net = AttributeNet()
    net.load_state_dict(load_file(path))
    return net.eval(), json.loads(header["held_out_accuracy"])


@torch.no_grad()
def predict(net: AttributeNet, images_BHWC: NDArray[np.uint8]) -> list[dict[str, str]]:
    """What each picture (S, S, 3) shows, slot by slot."""
    answers: list[dict[str, str]] = []
    for start in range(0, len(images_BHWC), 256):
        best = {slot: logits.argmax(1).tolist() for slot, logits in net(shrink(images_BHWC[start:start + 256])).items()}
        answers += [{slot: VALUES[slot][best[slot][i]] for slot in JUDGED} for i in range(len(best["style"]))]
    return answers


def accuracy(answers: Sequence[dict[str, str]], rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Share of rows whose value was named, per slot, where the value can be seen."""
    right = {}
    for slot, truth in labels(rows).items():
        known = [i for i, t in enumerate(truth.tolist()) if t >= 0]
        right[slot] = sum(answers[i][slot] == rows[i][slot] for i in known) / max(1, len(known))
    return right


def digest(path: Path) -> str:
    """sha256 of the classifier's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("build/maquette"), help="work folder of models.maquette.pretrain: its crops are read")
    p.add_argument("--out", type=Path, help="default: WORK/attributes.safetensors")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    right = train(a.work, a.out or a.work / "attributes.safetensors", epochs=a.epochs)
    print("held-out accuracy: " + "  ".join(f"{slot} {share:.3f}" for slot, share in right.items()))


if __name__ == "__main__":
    main()
