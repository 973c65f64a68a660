"""What the stages of the maquette's training share: the plans, where the work happens, the one loop, crops as tensors, contact sheets."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HELD_OUT = 60      # the last identities of the data are never trained on: they measure the VAE, CLIP and novelty


@dataclass(frozen=True)
class Plan:
    """How large and how long. Sizes are of the diffusers/transformers classes; budgets are in samples (images seen)."""

    side_px: int = 128
    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_latents: int = 4
    vae_window_px: int = 64           # the VAE sees random windows of this side, and whole crops for the last 15 % of its steps
    vae_samples: int = 36_000
    vae_batch: int = 4
    vae_lr: float = 1e-3
    decoder_samples: int = 24_000
    decoder_lr: float = 1e-3
    clip_width: int = 256
    clip_layers: int = 4
    clip_samples: int = 64_000
    clip_batch: int = 64
    clip_lr: float = 1e-3
    tower_samples: int = 179_200
    tower_lr: float = 7e-4
    unet_channels: tuple[int, ...] = (96, 128, 192)
    unet_layers: int = 1
    unet_samples: int = 137_600
    unet_batch: int = 32
    unet_lr: float = 6e-4
    caption_dropout: float = 0.1
    min_snr: float = 5.0
    ema: float = 0.9995
    captions_per_picture: int = 3
    seed: int = 0


PLANS = {
    # two CPU cores, about two hours: what one sitting without a GPU can afford
    "cpu": Plan(),
    # one large GPU, under an hour: 17M parameters, 30M samples
    "gpu": Plan(vae_channels=(32, 64, 128, 128), vae_samples=1_500_000, vae_batch=64, vae_lr=1e-3, decoder_samples=500_000, clip_samples=1_500_000, clip_batch=512,
                clip_lr=1e-3, tower_samples=3_000_000, tower_lr=1e-3, unet_channels=(128, 192, 224), unet_samples=30_000_000, unet_batch=512, unet_lr=8e-4, ema=0.9998,
                captions_per_picture=8),
    # a rehearsal of every stage in a minute, for tests
    "toy": Plan(side_px=32, vae_channels=(8, 8, 16, 16), vae_window_px=16, vae_samples=64, vae_batch=8, decoder_samples=32, clip_width=32, clip_layers=1, clip_samples=64, clip_batch=16, tower_samples=64,
                unet_channels=(16, 16, 32), unet_samples=64, unet_batch=8, captions_per_picture=2),
}


@dataclass
class Place:
    """Where the work happens: folder, device, precision."""

    work: Path
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    compile: bool
    minutes: float | None = None      # stop a stage cleanly after this long; the checkpoint resumes it
    init: Path | None = None          # an exported pipeline to go on from, where a stage has no checkpoint yet
    started: float = field(default_factory=time.monotonic)

    @staticmethod
    def here(work: Path, minutes: float | None, init: Path | None = None) -> Place:
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
            return Place(work, torch.device("cuda"), lambda: torch.autocast("cuda", torch.bfloat16), True, minutes, init)
        return Place(work, torch.device("cpu"), _cpu_bfloat16 if bfloat16_pays() else contextlib.nullcontext, False, minutes, init)


@contextlib.contextmanager
def _cpu_bfloat16() -> Iterator[None]:
    """bfloat16 with plain attention: the flash kernel's backward took 29 % of a UNet step on 64 tokens, and plain products a quarter of that."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def bfloat16_pays() -> bool:
    """Whether this CPU convolves faster in bfloat16: 2.3 times with AVX512-BF16, 13 times slower without."""
    def seconds(dtype: torch.dtype) -> float:
        x, conv = torch.randn(8, 64, 16, 16).to(dtype), nn.Conv2d(64, 64, 3, padding=1).to(dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            conv(x).sum().backward()
            times.append(time.perf_counter() - began)
        return min(times)
    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


@dataclass
class Trained:
    """Exactly what a checkpoint holds: the step, the weights, their moving average, the optimizer's moments."""

    name: str
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, folder: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optim.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        target = folder / f"{self.name}.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, target.with_suffix(".part"), {"step": str(self.step)})
        target.with_suffix(".part").rename(target)

    def resume(self, place: Place) -> None:
        path = place.work / f"{self.name}.safetensors"
        if not path.exists():
            self._go_on_from(place.init)
            return
        with safe_open(path, "pt") as f:
            self.step = int(f.metadata()["step"])
        tensors = load_file(path)
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        if self.ema is not None:
            self.ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optim."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = value
        if state:
            self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        print(f"{self.name}: resumed at step {self.step}", flush=True)

    def _go_on_from(self, pipeline: Path | None) -> None:
        if pipeline is None:
            return
        tensors: dict[str, Tensor] = {}
        for file in sorted((pipeline / self.name).glob("*.safetensors")):
            tensors |= load_file(file)
        for net in (self.model, self.ema):
            if net is not None:
                net.load_state_dict(tensors)
        print(f"{self.name}: begins with the weights of {pipeline}", flush=True)


def fit(trained: Trained, place: Place, *, steps: int, lr: float, loss_of: Callable[[int], dict[str, Tensor]], ema_decay: float = 0.0,
        log_every: int = 100, save_every: int = 500, sheet: Callable[[int], None] | None = None) -> bool:
    """The one loop of all three stages; returns whether all steps are done.

    `loss_of(step)` draws its own batch from a generator seeded by the step, so a resumed run sees what an undisturbed one would.
    Learning rate: linear warm-up over 2 % of the steps, then half a cosine down to 2 %.
    """
    warm = max(1, steps // 50)
    sums: dict[str, float] = {}
    began, at = time.monotonic(), trained.step
    trained.model.train()
    while trained.step < steps:
        step = trained.step
        rate = lr * min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in trained.optimizer.param_groups:
            group["lr"] = rate
        # -- loss
        with place.autocast():
            losses = loss_of(step)
        # -- gradient
        losses["loss"].backward()
        # -- update
        nn.utils.clip_grad_norm_(trained.model.parameters(), 1.0)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        if trained.ema is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(trained.ema.parameters()), list(trained.model.parameters()), 1 - decay)
        trained.step = step + 1
        # -- once in a while
        if trained.step % 10 == 0:       # .item() waits for the device
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + float(v.detach())
        if trained.step % log_every == 0 or trained.step == steps:
            n = max(1, len(range(at // 10, trained.step // 10)))
            pace = (time.monotonic() - began) / max(1, trained.step - at)
            words = "  ".join(f"{k} {v / n:.4f}" for k, v in sums.items())
            print(f"{trained.name} {trained.step}/{steps}  {words}  {pace:.3f} s/step  {pace * (steps - trained.step) / 60:.0f} min left", flush=True)
            sums, began, at = {}, time.monotonic(), trained.step
        late = place.minutes is not None and time.monotonic() - place.started > 60 * place.minutes
        if trained.step % save_every == 0 or trained.step == steps or late:
            trained.save(place.work)
            if sheet is not None:
                sheet(trained.step)
        if late:
            print(f"{trained.name}: time is up at step {trained.step} of {steps}; run the same command to go on", flush=True)
            return False
    return True


def adamw(model: nn.Module, lr: float, *, decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that are trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=decay, betas=betas, fused=True)


def split(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) picture numbers; held out are all pictures of the last HELD_OUT identities, or of the last tenth of them."""
    identities = sorted({r["identity"] for r in rows})
    held = set(identities[-min(HELD_OUT, max(1, len(identities) // 10)):])
    mask = np.array([r["identity"] in held for r in rows])
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def pixels(crops: np.ndarray, numbers: np.ndarray, device: torch.device) -> Tensor:
    """Crops (B, S, S, 3) uint8 as (B, 3, S, S) in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(crops[numbers])).to(device)
    return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def picture_sheet(images_BCHW: Tensor, path: Path, columns: int = 8) -> None:
    """Write images in [-1, 1] as one contact sheet."""
    x = ((images_BCHW.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    x = np.pad(x, ((0, -len(x) % columns), (0, 0), (0, 0), (0, 0)))
    rows = [np.concatenate(list(x[i:i + columns]), axis=1) for i in range(0, len(x), columns)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)
