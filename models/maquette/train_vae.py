"""Stage `vae`: the autoencoder."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from models.maquette import data
from models.maquette.training import Place, Plan, Trained, adamw, fit, picture_sheet, pixels, split

FACE_WEIGHT = 6.0       # beyond the margin's 1; at 2.0 a face moved by 0.413 in dlib's metric: docs/log.md, 2026-11-25
FACE_WINDOWS = 0.7      # share of windows about the face


def new_vae(plan: Plan) -> AutoencoderKL:
    """An untrained AutoencoderKL of the plan's size: f8."""
    n = len(plan.vae_channels)
    return AutoencoderKL(block_out_channels=plan.vae_channels, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
                         layers_per_block=1, latent_channels=plan.vae_latents, norm_num_groups=8, sample_size=plan.side_px)


def train_vae(plan: Plan, place: Place) -> bool:
    """AutoencoderKL, f8: L1 + squared error + error of the image gradients, weighted towards the face, with a little KL.

    A recogniser reads the reconstruction, and aligned crops say where the face is: it gets seven times the weight of the margin, and most
    windows lie about it.
    """
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    torch.manual_seed(plan.seed)
    vae = new_vae(plan).to(place.device)
    trained = Trained("vae", vae, None, adamw(vae, plan.vae_lr, decay=0.0))
    trained.resume(place)
    side = plan.side_px
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    face = torch.exp(-(((x - 0.5) / 0.24) ** 4 + ((y - 0.5) / 0.32) ** 4)).to(place.device)
    everywhere = (1 + FACE_WEIGHT * face) / (1 + FACE_WEIGHT * face).mean()
    steps = plan.vae_samples // plan.vae_batch

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 1, step])
        real, weight = pixels(crops, rng.choice(train, plan.vae_batch), place.device), everywhere
        if rng.random() < 0.5:
            real = real.flip(3)
        if step < 0.85 * steps:
            free = side - plan.vae_window_px
            low, high = (free // 4, free - free // 4) if rng.random() < FACE_WINDOWS else (0, free)
            top, left = (int(n) for n in rng.integers(low, high + 1, 2))
            window = slice(top, top + plan.vae_window_px), slice(left, left + plan.vae_window_px)
            real, weight = real[:, :, *window], everywhere[window]
        posterior = vae.encode(real).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step)).to(place.device)
        made = vae.decode(z).sample
        error = made - real
        flat = (weight * (error.abs() + 2 * error.square())).mean()
        edges = (weight[:, 1:] * (error[..., 1:] - error[..., :-1]).abs()).mean() + (weight[1:] * (error[..., 1:, :] - error[..., :-1, :]).abs()).mean()
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


def load_vae(plan: Plan, place: Place) -> AutoencoderKL:
    """The autoencoder as far as it is trained, frozen."""
    vae = new_vae(plan)
    vae.load_state_dict({k[6:]: v for k, v in load_file(place.work / "vae.safetensors").items() if k.startswith("model.")})
    return vae.to(place.device).eval().requires_grad_(False)
