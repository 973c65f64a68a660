"""Stages `vae` and `decoder`: the autoencoder, then its decoder alone."""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from models.diffusion.objective import reconstruction_loss
from models.maquette import data
from models.maquette.training import Place, Plan, Trained, adamw, fit, picture_sheet, pixels, split

FACE_WEIGHT = 6.0       # beyond the margin's 1; at 2.0 a face moved by 0.413 in dlib's metric: docs/log.md, 2026-11-25
FACE_WINDOWS = 0.7      # share of windows about the face
WINDOWED = 0.85         # share of the steps that see windows; the last ones see whole crops
DECODER_NOISE = 0.03    # of the scaled latents


def new_vae(plan: Plan) -> AutoencoderKL:
    """An untrained AutoencoderKL of the plan's size: f8."""
    n = len(plan.vae_channels)
    return AutoencoderKL(block_out_channels=plan.vae_channels, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
                         layers_per_block=1, latent_channels=plan.vae_latents, norm_num_groups=8, sample_size=plan.side_px)


def load_vae(plan: Plan, place: Place) -> AutoencoderKL:
    """The autoencoder as far as it is trained, frozen: with the decoder of `decoder` if that stage has begun."""
    files = [f for f in (place.work / "decoder.safetensors", place.work / "vae.safetensors") if f.exists()]
    vae = new_vae(plan)
    vae.load_state_dict({k[6:]: v for k, v in load_file(files[0]).items() if k.startswith("model.")})
    return vae.to(place.device).eval().requires_grad_(False)


def train_vae(plan: Plan, place: Place) -> bool:
    """AutoencoderKL, f8, with a little KL."""
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    torch.manual_seed(plan.seed)
    vae = new_vae(plan).to(place.device)
    trained = Trained("vae", vae, None, adamw(vae, plan.vae_lr, decay=0.0))
    trained.resume(place)
    everywhere = face_weight(plan.side_px).to(place.device)
    steps = plan.vae_samples // plan.vae_batch

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 1, step])
        real, weight = pixels(crops, rng.choice(train, plan.vae_batch), place.device), everywhere
        if rng.random() < 0.5:
            real = real.flip(3)
        if step < WINDOWED * steps:
            rows_px, columns_px = window(plan, rng)
            real, weight = real[:, :, rows_px, columns_px], everywhere[rows_px, columns_px]
        posterior = vae.encode(real).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step)).to(place.device)
        made = vae.decode(z).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": reconstruction_loss(made, real, weight) + 1e-4 * kl, "mse": (made - real).square().mean(), "kl": kl}

    return fit(trained, place, steps=steps, lr=plan.vae_lr, loss_of=loss_of, sheet=lambda step: _sheet(vae, crops, held, place, name="vae", step=step))


def train_decoder(plan: Plan, place: Place) -> bool:
    """The decoder alone, on the latents that the UNet learns: what it gains costs the UNet nothing, so it may run beside `unet` or after it.

    Latents get a little noise, since those that the UNet draws are not exactly an encoder's.
    """
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    latents = np.load(place.work / "latents.npy", mmap_mode="r")
    noise = DECODER_NOISE / float(json.loads((place.work / "scaling.json").read_text())["scaling_factor"])
    vae = new_vae(plan)
    vae.load_state_dict({k[6:]: v for k, v in load_file(place.work / "vae.safetensors").items() if k.startswith("model.")})
    vae.to(place.device).requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    trained = Trained("decoder", vae, None, adamw(vae, plan.decoder_lr, decay=0.0))
    trained.resume(place)
    everywhere = face_weight(plan.side_px).to(place.device)
    steps = plan.decoder_samples // plan.vae_batch

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 5, step])
        numbers = rng.choice(train, plan.vae_batch)
        real, weight, z = pixels(crops, numbers, place.device), everywhere, torch.from_numpy(latents[numbers].astype(np.float32)).to(place.device)
        if step < WINDOWED * steps:
            rows_px, columns_px = window(plan, rng, grid=8)
            real, weight = real[:, :, rows_px, columns_px], everywhere[rows_px, columns_px]
            z = z[:, :, rows_px.start // 8:rows_px.stop // 8, columns_px.start // 8:columns_px.stop // 8]
        z = z + noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(place.device)
        made = vae.decode(z).sample
        return {"loss": reconstruction_loss(made, real, weight), "mse": (made - real).square().mean()}

    return fit(trained, place, steps=steps, lr=plan.decoder_lr, loss_of=loss_of, sheet=lambda step: _sheet(vae, crops, held, place, name="decoder", step=step))


# -- what both stages do

def face_weight(side: int) -> Tensor:
    """(S, S), mean 1: how much each pixel of an aligned crop counts. A recogniser reads the reconstruction, and alignment says where the face is."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    weight = 1 + FACE_WEIGHT * torch.exp(-(((x - 0.5) / 0.24) ** 4 + ((y - 0.5) / 0.32) ** 4))
    return weight / weight.mean()


def window(plan: Plan, rng: np.random.Generator, *, grid: int = 1) -> tuple[slice, slice]:
    """(rows, columns) of a random window, most often about the face; its corner lies on a grid of so many pixels."""
    free = plan.side_px - plan.vae_window_px
    low, high = (free // 4, free - free // 4) if rng.random() < FACE_WINDOWS else (0, free)
    top, left = (int(n) // grid * grid for n in rng.integers(low, high + 1, 2))
    return slice(top, top + plan.vae_window_px), slice(left, left + plan.vae_window_px)


@torch.no_grad()
def _sheet(vae: AutoencoderKL, crops: NDArray[np.uint8], held: NDArray[np.int64], place: Place, *, name: str, step: int) -> None:
    vae.eval()
    real = pixels(crops, held[:: max(1, len(held) // 64)][:64], place.device)
    made = vae.decode(vae.encode(real).latent_dist.mean).sample.clamp(-1, 1)
    psnr = (10 * torch.log10(4 / (made - real).square().mean((1, 2, 3)))).mean()
    print(f"{name} {step}: held-out PSNR {psnr:.2f} dB", flush=True)
    picture_sheet(torch.cat([real[:8], made[:8], real[8:16], made[8:16]]), place.work / f"{name}-{step:06d}.png")
    vae.train()
