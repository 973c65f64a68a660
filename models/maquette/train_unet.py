"""Stage `unet`: the denoiser, on cached latents and text embeddings."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from models.maquette import data
from models.maquette.train_clip import load_clip
from models.maquette.train_vae import load_vae
from models.maquette.training import Place, Plan, Trained, adamw, fit, picture_sheet, pixels, split
from models.maquette.vocabulary import training_caption


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


@torch.no_grad()
def cache_latents(plan: Plan, place: Place) -> None:
    """Latent means of every crop, once: `latents.npy` (N, C, h, w) fp16, and their scaling factor in `scaling.json`."""
    if (place.work / "scaling.json").exists():
        return
    crops, rows = data.load(place.work / "data")
    vae = load_vae(plan, place)
    with place.autocast():
        parts = [vae.encode(pixels(crops, np.arange(start, min(start + 64, len(rows))), place.device)).latent_dist.mean.cpu().half()
                 for start in range(0, len(rows), 64)]
    latents = torch.cat(parts)
    np.save(place.work / "latents.npy", latents.numpy())
    (place.work / "scaling.json").write_text(json.dumps({"scaling_factor": 1 / float(latents.float().std())}))
    print(f"cached {len(latents)} latents", flush=True)


@torch.no_grad()
def cache_texts(plan: Plan, place: Place) -> None:
    """Text states of several captions of every crop, once: `texts.npy` (N, K, T, D) fp16."""
    if (place.work / "texts.npy").exists():
        return
    _, rows = data.load(place.work / "data")
    clip, words = load_clip(plan, place)
    rng = random.Random(plan.seed)
    captions = [training_caption(row, rng) for row in rows for _ in range(plan.captions_per_picture)]
    part = place.work / "texts.part.npy"
    texts = np.lib.format.open_memmap(part, "w+", np.float16, (len(captions), words.model_max_length, plan.clip_width))
    for start in range(0, len(captions), 256):
        ids = words(captions[start:start + 256], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(place.device)
        texts[start:start + 256] = clip.text_model(input_ids=ids).last_hidden_state.cpu().half().numpy()
    texts.flush()
    part.rename(place.work / "texts.npy")
    print(f"cached {len(captions)} captions", flush=True)


def train_unet(plan: Plan, place: Place) -> bool:
    """v-prediction with min-SNR weights (arXiv 2303.09556) and caption dropout, on cached latents and text embeddings."""
    cache_latents(plan, place)
    cache_texts(plan, place)
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
    trained = Trained("unet", unet, copy.deepcopy(unet).requires_grad_(False), adamw(unet, plan.unet_lr))
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
