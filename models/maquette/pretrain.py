"""Pre-train the maquette: a Stable Diffusion pipeline in miniature, from captioned portraits.

    python -m models.maquette.pretrain all --data DIR_OR_TAR ... --work WORK --out OUT --plan cpu

Four stages, each resumable at any step, each a short function below: `prepare` (aligned crops), `vae`, `clip` (text and image tower,
contrastive; also builds the tokenizer), `unet` (v-prediction on cached latents), then `export` (fp16 safetensors that plain
`StableDiffusionPipeline.from_pretrained` loads). `vae` and `clip` may run at the same time. The plan says how large and how long.
Plain torch, diffusers and transformers: nothing here knows of Prefect or MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from models.diffusion import bases
from models.maquette import data, tokenizer
from models.maquette.vocabulary import SLOTS, slot_prompt, training_caption

HELD_OUT = 60      # the last identities of the data are never trained on: they measure the VAE, CLIP and novelty


@dataclass(frozen=True)
class Plan:
    """How large and how long. Sizes are of the diffusers/transformers classes; budgets are in samples (images seen)."""

    side_px: int = 128
    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_latents: int = 4
    vae_window_px: int = 64           # the VAE sees random windows of this side, and whole crops for the last 15 % of its steps
    vae_samples: int = 20_800
    vae_batch: int = 4
    vae_lr: float = 1.5e-3
    clip_width: int = 256
    clip_layers: int = 4
    clip_samples: int = 40_000
    clip_batch: int = 64
    clip_lr: float = 7e-4
    unet_channels: tuple[int, ...] = (96, 128, 192)
    unet_layers: int = 1
    unet_samples: int = 112_000
    unet_batch: int = 16
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
    "gpu": Plan(vae_channels=(32, 64, 128, 128), vae_samples=1_500_000, vae_batch=64, vae_lr=1e-3, clip_samples=3_000_000, clip_batch=512,
                clip_lr=1e-3, unet_channels=(128, 192, 224), unet_samples=30_000_000, unet_batch=512, unet_lr=8e-4, ema=0.9998,
                captions_per_picture=8),
    # a rehearsal of every stage in a minute, for tests
    "toy": Plan(side_px=32, vae_channels=(8, 8, 16, 16), vae_window_px=16, vae_samples=64, vae_batch=8, clip_width=32, clip_layers=1, clip_samples=64, clip_batch=16,
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
        torch.set_flush_denormal(True)
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
            return Place(work, torch.device("cuda"), lambda: torch.autocast("cuda", torch.bfloat16), True, minutes, init)
        autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if bfloat16_pays() else contextlib.nullcontext
        return Place(work, torch.device("cpu"), autocast, False, minutes, init)


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


# ---------------------------------------------------------------------------------------------------------------- one training loop

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
        from safetensors import safe_open

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


def adamw(model: nn.Module, lr: float, place: Place, *, decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=betas, fused=True)


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


# ------------------------------------------------------------------------------------------------------------------------- the VAE

def new_vae(plan: Plan) -> AutoencoderKL:
    n = len(plan.vae_channels)
    return AutoencoderKL(block_out_channels=plan.vae_channels, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
                         layers_per_block=1, latent_channels=plan.vae_latents, norm_num_groups=8, sample_size=plan.side_px)


def train_vae(plan: Plan, place: Place) -> bool:
    """AutoencoderKL, f8: L1 + squared error + error of the image gradients, weighted towards the face, with a little KL.

    The face gets three times the weight of the margin: a recogniser reads the reconstruction, and aligned crops say where it is.
    """
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    torch.manual_seed(plan.seed)
    vae = new_vae(plan).to(place.device)
    trained = Trained("vae", vae, None, adamw(vae, plan.vae_lr, place, decay=0.0))
    trained.resume(place)
    side = plan.side_px
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    face = torch.exp(-(((x - 0.5) / 0.24) ** 4 + ((y - 0.5) / 0.32) ** 4)).to(place.device)
    everywhere = (1 + 2 * face) / (1 + 2 * face).mean()
    steps = plan.vae_samples // plan.vae_batch

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 1, step])
        real, weight = pixels(crops, rng.choice(train, plan.vae_batch), place.device), everywhere
        if rng.random() < 0.5:
            real = real.flip(3)
        if step < 0.85 * steps:
            top, left = (int(n) for n in rng.integers(0, side - plan.vae_window_px + 1, 2))
            window = slice(top, top + plan.vae_window_px), slice(left, left + plan.vae_window_px)
            real, weight = real[:, :, *window], everywhere[window]
        posterior = vae.encode(real).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step)).to(place.device)
        made = vae.decode(z).sample
        error = made - real
        flat = (weight * (error.abs() + 2 * error.square())).mean()
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": flat + 0.5 * edges + 1e-4 * kl, "mse": error.square().mean(), "kl": kl}

    def sheet(step: int) -> None:
        vae.eval()
        with torch.no_grad():
            real = pixels(crops, held[:: max(1, len(held) // 64)][:64], place.device)
            made = vae.decode(vae.encode(real).latent_dist.mean).sample.clamp(-1, 1)
            psnr = (10 * torch.log10(4 / (made - real).square().mean((1, 2, 3)))).mean()
            print(f"vae {step}: held-out PSNR {psnr:.2f} dB", flush=True)
            picture_sheet(torch.cat([real[:8], made[:8], real[8:16], made[8:16]]), place.work / f"vae-{step:06d}.png")
        vae.train()

    return fit(trained, place, steps=steps, lr=plan.vae_lr, loss_of=loss_of, sheet=sheet)


# ---------------------------------------------------------------------------------------------------------------------------- CLIP

def new_clip(plan: Plan, words: CLIPTokenizer) -> CLIPModel:
    common = dict(hidden_size=plan.clip_width, intermediate_size=4 * plan.clip_width, num_hidden_layers=plan.clip_layers,
                  num_attention_heads=max(2, plan.clip_width // 64), projection_dim=plan.clip_width, hidden_act="gelu")
    text = common | dict(vocab_size=len(words), max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id,
                         eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    vision = common | dict(image_size=plan.side_px, patch_size=max(4, plan.side_px // 8))
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=plan.clip_width))


def train_clip(plan: Plan, place: Place) -> bool:
    """Both towers, contrastively: pictures against whole captions, and pictures against the phrases of each slot.

    The first term is CLIP's own. The second is the same thing with the classes of one slot as the candidates: what zero-shot
    classification will do, so few samples suffice. Sides are swapped in pictures and in words together.
    """
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    words = tokenizer.build(place.work / "tokenizer")
    torch.manual_seed(plan.seed + 1)
    clip = new_clip(plan, words).to(place.device)
    trained = Trained("clip", clip, None, adamw(clip, plan.clip_lr, place, decay=0.05, betas=(0.9, 0.98)))
    trained.resume(place)
    prompt_ids = {slot: words([slot_prompt(slot, value) for value in SLOTS[slot].phrases], padding="longest", return_tensors="pt").input_ids.to(place.device)
                  for slot in SLOTS}

    def image_features(pixel_values: Tensor) -> Tensor:
        return F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixel_values).pooler_output), dim=1)

    def text_features(ids: Tensor) -> Tensor:
        return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=1)

    def slot_scores(image: Tensor, slots: list[str], attributes: list[dict[str, str]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per slot, scores of its phrases (B, values) and the number of the true one (B), -1 where it has none."""
        width = max(prompt_ids[slot].shape[1] for slot in slots)
        ids = torch.cat([F.pad(prompt_ids[slot], (0, width - prompt_ids[slot].shape[1]), value=words.pad_token_id) for slot in slots])
        text = text_features(ids).split([len(prompt_ids[slot]) for slot in slots])
        truth = {slot: torch.tensor([values.index(a[slot]) if a[slot] in values else -1 for a in attributes], device=image.device)
                 for slot in slots for values in (list(SLOTS[slot].phrases),)}
        return {slot: clip.logit_scale.exp() * image @ part.T for slot, part in zip(slots, text, strict=True)}, truth

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 2, step])
        numbers = rng.choice(train, plan.clip_batch, replace=False)
        attributes = [dict(rows[i]) for i in numbers]
        real = pixels(crops, numbers, place.device)
        if rng.random() < 0.5:
            real = real.flip(3)
            for a in attributes:
                a["view"] = a["view"].replace("left", "other").replace("right", "left").replace("other", "right")
        real = real * float(rng.uniform(0.9, 1.1)) + float(rng.uniform(-0.08, 0.08))
        dy, dx = (int(d) for d in rng.integers(-6, 7, 2))
        image = image_features(torch.roll(real, (dy, dx), (2, 3)))
        # Text costs as much as pictures: captions for half of the batch, and half of the slots, are as good per step at two thirds of the time
        half = plan.clip_batch // 2
        clauses = random.Random(step)
        captions = [training_caption(a, clauses) for a in attributes[:half]]
        text = text_features(words(captions, padding="longest", truncation=True, return_tensors="pt").input_ids.to(place.device))
        scores = (clip.logit_scale.exp() * image[:half] @ text.T).float()
        target = torch.arange(half, device=place.device)
        pairs = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        by_slot, truth = slot_scores(image, [str(s) for s in rng.permutation(list(SLOTS))[: len(SLOTS) // 2]], attributes)
        slots = torch.stack([F.cross_entropy(by_slot[s].float(), truth[s], ignore_index=-1) for s in by_slot]).mean()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        return {"loss": pairs + 4 * slots, "pairs": pairs, "slots": slots}

    def sheet(step: int) -> None:
        clip.eval()
        with torch.no_grad():
            some = held[:: max(1, len(held) // 256)]
            by_slot, truth = slot_scores(image_features(pixels(crops, some, place.device)), list(SLOTS), [rows[i] for i in some])
            right = {s: float((by_slot[s].argmax(1) == truth[s])[truth[s] >= 0].float().mean()) for s in SLOTS}
            print(f"clip {step}: held-out zero-shot " + " ".join(f"{k} {v:.2f}" for k, v in right.items())
                  + f" | mean {sum(right.values()) / len(right):.3f}", flush=True)
        clip.train()

    return fit(trained, place, steps=plan.clip_samples // plan.clip_batch, lr=plan.clip_lr, loss_of=loss_of, sheet=sheet, log_every=50, save_every=250)


# ------------------------------------------------------------------------------------------------------------------------ the UNet

def new_unet(plan: Plan) -> UNet2DConditionModel:
    """Attention from the 8x8 level down: at 16x16 too it costs more per image (docs/log.md); what it would buy was not measured."""
    return UNet2DConditionModel(sample_size=plan.side_px // 8, in_channels=plan.vae_latents, out_channels=plan.vae_latents, block_out_channels=plan.unet_channels, layers_per_block=plan.unet_layers,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=plan.clip_width, attention_head_dim=8, norm_num_groups=16)


def new_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR (arXiv 2305.08891): plain black and white backgrounds need it."""
    return DDIMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                         rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1)


def load_vae(plan: Plan, place: Place) -> AutoencoderKL:
    vae = new_vae(plan)
    vae.load_state_dict({k[6:]: v for k, v in load_file(place.work / "vae.safetensors").items() if k.startswith("model.")})
    return vae.to(place.device).eval().requires_grad_(False)


def load_clip(plan: Plan, place: Place) -> tuple[CLIPModel, CLIPTokenizer]:
    words = tokenizer.build(place.work / "tokenizer")
    clip = new_clip(plan, words)
    clip.load_state_dict({k[6:]: v for k, v in load_file(place.work / "clip.safetensors").items() if k.startswith("model.")})
    return clip.to(place.device).eval().requires_grad_(False), words


@torch.no_grad()
def cache_inputs(plan: Plan, place: Place) -> None:
    """Latents of every crop and text embeddings of several captions each, once: `latents.npy` (N, 4, h, w), `texts.npy` (N, K, T, D), fp16."""
    if (place.work / "texts.npy").exists():
        return
    crops, rows = data.load(place.work / "data")
    vae = load_vae(plan, place)
    means = []
    for start in range(0, len(rows), 64):
        means.append(vae.encode(pixels(crops, np.arange(start, min(start + 64, len(rows))), place.device)).latent_dist.mean.cpu().half())
    latents = torch.cat(means)
    (place.work / "scaling.json").write_text(json.dumps({"scaling_factor": 1 / float(latents.float().std())}))
    np.save(place.work / "latents.npy", latents.numpy())
    clip, words = load_clip(plan, place)
    rng = random.Random(plan.seed)
    captions = [training_caption(row, rng) for row in rows for _ in range(plan.captions_per_picture)]
    shape = (len(rows), plan.captions_per_picture, words.model_max_length, plan.clip_width)
    texts = np.lib.format.open_memmap(place.work / "texts.part.npy", "w+", np.float16, (shape[0] * shape[1], *shape[2:]))
    for start in range(0, len(captions), 256):
        ids = words(captions[start:start + 256], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(place.device)
        texts[start:start + 256] = clip.text_model(input_ids=ids).last_hidden_state.cpu().half().numpy()
    texts.flush()
    (place.work / "texts.part.npy").rename(place.work / "texts.npy")
    print("cached latents and text embeddings", flush=True)


def train_unet(plan: Plan, place: Place) -> bool:
    """v-prediction with min-SNR weights (arXiv 2303.09556) and caption dropout, on cached latents and text embeddings."""
    cache_inputs(plan, place)
    _, rows = data.load(place.work / "data")
    train, _ = split(rows)
    scale = json.loads((place.work / "scaling.json").read_text())["scaling_factor"]
    latents = torch.from_numpy(np.load(place.work / "latents.npy")).float().mul_(scale).to(place.device)
    texts = np.load(place.work / "texts.npy", mmap_mode="r").reshape(len(rows), plan.captions_per_picture, -1, plan.clip_width)
    clip, words = load_clip(plan, place)
    with torch.no_grad():
        def encode(captions: list[str]) -> Tensor:
            ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(place.device)
            states: Tensor = clip.text_model(input_ids=ids).last_hidden_state
            return states
        nothing = encode([""])
        rng = random.Random(7)
        shown = encode([training_caption(rows[i], rng) for i in rng.sample(list(train), min(32, len(train)))])
    torch.manual_seed(plan.seed + 2)
    unet = new_unet(plan).to(place.device)
    trained = Trained("unet", unet, copy.deepcopy(unet).requires_grad_(False), adamw(unet, plan.unet_lr, place))
    trained.resume(place)
    net = torch.compile(unet) if place.compile else unet
    alphas = new_scheduler().alphas_cumprod.to(place.device)

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 3, step])
        numbers = rng.choice(train, plan.unet_batch)
        draw = torch.Generator().manual_seed(step)
        x0 = latents[torch.from_numpy(numbers).to(place.device)]
        noise = torch.randn(x0.shape, generator=draw).to(place.device)
        t = torch.randint(0, len(alphas), (len(x0),), generator=draw).to(place.device)
        a = alphas[t].view(-1, 1, 1, 1)
        text = torch.from_numpy(texts[numbers, rng.integers(0, plan.captions_per_picture, len(numbers))]).float().to(place.device)
        drop = torch.from_numpy(rng.random(len(numbers)) < plan.caption_dropout).to(place.device)
        text = torch.where(drop.view(-1, 1, 1), nothing, text)
        made = net(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text).sample
        target = a.sqrt() * noise - (1 - a).sqrt() * x0
        snr = a.flatten() / (1 - a.flatten()).clamp(min=1e-8)
        weight = snr.clamp(max=plan.min_snr) / (snr + 1)
        weight = weight.clamp(min=0.05)      # t = T has SNR 0, and is where a sample begins: it must be learnt too
        error = (made.float() - target).square().mean((1, 2, 3))
        return {"loss": (weight * error).mean(), "v_mse": error.mean()}

    def sheet(step: int) -> None:
        assert trained.ema is not None
        images = sample(trained.ema.eval(), load_vae(plan, place), shown, nothing, scale, seed=1)
        picture_sheet(images, place.work / f"unet-{step:06d}.png")

    samples_per_sheet = 16_000
    return fit(trained, place, steps=plan.unet_samples // plan.unet_batch, lr=plan.unet_lr, loss_of=loss_of, ema_decay=plan.ema, sheet=sheet,
               save_every=max(1, samples_per_sheet // plan.unet_batch) if not place.compile else 5_000)


@torch.no_grad()
def sample(unet: nn.Module, vae: AutoencoderKL, text: Tensor, nothing: Tensor, scale: float, *, seed: int, steps: int = 20, guidance: float = 3.0) -> Tensor:
    """DDIM with guidance, for the sheets: images (B, 3, S, S)."""
    scheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    side = vae.config.sample_size // 8
    x = torch.randn((len(text), vae.config.latent_channels, side, side), generator=torch.Generator().manual_seed(seed)).to(text.device)
    both = torch.cat([nothing.expand_as(text), text])
    for t in scheduler.timesteps:
        v0, v1 = unet(torch.cat([x, x]), t.to(text.device), both).sample.float().chunk(2)
        x = scheduler.step(v0 + guidance * (v1 - v0), t, x).prev_sample
    images: list[Tensor] = [vae.decode(part / scale).sample for part in x.split(16)]
    return torch.cat(images)


# -------------------------------------------------------------------------------------------------------------------------- export

def export(plan: Plan, place: Place, out: Path) -> None:
    """Write the pipeline as fp16 safetensors in shards under 16 MB, and the whole CLIP beside it; load both to prove it."""
    scale = json.loads((place.work / "scaling.json").read_text())["scaling_factor"]
    vae = load_vae(plan, place)
    vae.register_to_config(scaling_factor=scale)
    clip, words = load_clip(plan, place)
    text = CLIPTextModel(clip.config.text_config)
    weights = clip.text_model.state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in text.state_dict()) else ""      # transformers 5 dropped the level
    text.load_state_dict({prefix + k: v for k, v in weights.items()})
    unet = new_unet(plan)
    tensors = load_file(place.work / "unet.safetensors")
    unet.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    target = out.with_name(out.name + ".part")
    shutil.rmtree(target, ignore_errors=True)
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=new_scheduler(), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.to(torch.float16).save_pretrained(target, max_shard_size="14MB")
    clip.half().save_pretrained(target / "clip", max_shard_size="14MB")
    words.save_pretrained(target / "clip")
    CLIPImageProcessor(size={"shortest_edge": plan.side_px}, crop_size=plan.side_px, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(target / "clip")
    (target / "plan.json").write_text(json.dumps(asdict(plan), indent=1) + "\n")
    bases.write_manifest(target)
    StableDiffusionPipeline.from_pretrained(target, dtype=torch.float32)
    CLIPModel.from_pretrained(target / "clip")
    shutil.rmtree(out, ignore_errors=True)
    target.rename(out)
    files = [p for p in out.rglob("*") if p.is_file()]
    print(f"{out}: {sum(p.stat().st_size for p in files) / 1e6:.1f} MB, largest file {max(p.stat().st_size for p in files) / 1e6:.1f} MB", flush=True)


def stages(names: list[str]) -> Iterator[str]:
    yield from (["prepare", "vae", "clip", "unet", "export"] if names == ["all"] else names)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", nargs="+", choices=["all", "prepare", "vae", "clip", "unet", "export"])
    p.add_argument("--data", type=Path, nargs="+", default=[], help="imagefolders or tars of captioned portraits")
    p.add_argument("--work", type=Path, required=True, help="folder of crops, caches and checkpoints")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where the pipeline is written")
    p.add_argument("--plan", choices=sorted(PLANS), default="gpu" if torch.cuda.is_available() else "cpu")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a number of the plan, e.g. unet_samples=500000")
    p.add_argument("--minutes", type=float, help="stop cleanly after this long, to be resumed")
    p.add_argument("--init", type=Path, help="exported pipeline whose weights a stage begins with; its sizes and its vocabulary must be the plan's")
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    known = asdict(PLANS[a.plan])
    for item in a.set:
        key, _, value = item.partition("=")
        if key not in known or isinstance(known[key], tuple):
            p.error(f"--set {item}: no number of that name; there are {', '.join(k for k, v in known.items() if not isinstance(v, tuple))}")
        known[key] = type(known[key])(value)
    plan = Plan(**known)
    place = Place.here(a.work, a.minutes, a.init)
    a.work.mkdir(parents=True, exist_ok=True)
    for stage in stages(a.stage):
        if stage == "prepare":
            data.prepare(a.data, a.work / "data", side_px=plan.side_px)
        elif stage == "export":
            export(plan, place, a.out)
        elif not {"vae": train_vae, "clip": train_clip, "unet": train_unet}[stage](plan, place):
            break


if __name__ == "__main__":
    main()
