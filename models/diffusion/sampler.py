"""Sampling: one generator per picture, so that a picture depends on its prompt and seed, not on its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from models.diffusion.bases import Base


@torch.no_grad()
def sample(base: Base, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 20, guidance: float | None = None, batch: int = 8,
           progress: Callable[[int, int], None] | None = None) -> NDArray[np.uint8]:
    """One picture per (prompt, seed): (N, S, S, 3) uint8 RGB.

    Args:
        steps: denoising steps of the base's own scheduler.
        guidance: classifier-free guidance scale; None takes the base's own.
        batch: pictures per forward pass.
    """
    pictures = []
    for start in range(0, len(prompts), batch):
        part = [base.spell(prompt) for prompt in prompts[start:start + batch]]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start:start + batch]]
        shape = (1, base.unet.config.in_channels, base.unet.config.sample_size, base.unet.config.sample_size)
        noise = torch.cat([torch.randn(shape, generator=g) for g in generators]).to(base.device, base.dtype)
        out = base.pipe(part, latents=noise, num_inference_steps=steps, guidance_scale=base.guidance if guidance is None else guidance, output_type="np").images
        pictures.append((np.clip(out, 0, 1) * 255).round().astype(np.uint8))
        if progress is not None:
            progress(min(start + batch, len(prompts)), len(prompts))
    side = base.ref.resolution_px
    return np.concatenate(pictures) if pictures else np.zeros((0, side, side, 3), np.uint8)
