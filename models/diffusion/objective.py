"""The objective: what the network is asked for, and how much each error counts. Shapes: B batch, C latent channels, H and W latent sides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stratified_timesteps(count: int, *, total: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps (B,), one from each of `count` equal strata in random order: the same distribution, less noise per step."""
    order = torch.randperm(count, generator=generator)
    u = torch.rand(count, generator=generator)
    return ((order + u) / count * total).long().clamp(max=total - 1)


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise   (arXiv 2006.11239, equation 4)."""
    a = alpha_bar_B.view(-1, 1, 1, 1)
    return a.sqrt() * x0_BCHW + (1 - a).sqrt() * noise_BCHW


def target(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor, prediction: str) -> Tensor:
    """What the network should return: the noise, or v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x0 (arXiv 2202.00512, appendix D)."""
    if prediction == "epsilon":
        return noise_BCHW
    a = alpha_bar_B.view(-1, 1, 1, 1)
    return a.sqrt() * noise_BCHW - (1 - a).sqrt() * x0_BCHW


def snr_weight(alpha_bar_B: Tensor, prediction: str, min_snr: float) -> Tensor:
    """min-SNR weights (B,), arXiv 2303.09556: min(snr, gamma)/snr for epsilon, min(snr, gamma)/(snr + 1) for v.

    Bounded below by 0.05 for v, because at zero terminal SNR the weight would vanish where every sample begins.
    """
    snr = alpha_bar_B / (1 - alpha_bar_B).clamp(min=1e-8)
    if prediction == "epsilon":
        return snr.clamp(max=min_snr) / snr.clamp(min=1e-8)
    return (snr.clamp(max=min_snr) / (snr + 1)).clamp(min=0.05)


def mask_weight(mask_BHW: Tensor, *, height: int, width: int, background: float) -> Tensor:
    """Loss weights (B, 1, height, width) with mean 1 from face masks (B, S, S) in [0, 1].

    Max-pooling to latent scale dilates the mask by up to one latent cell, so that no cell that holds a piece of face counts as background.
    """
    face = F.adaptive_max_pool2d(mask_BHW[:, None], (height, width))
    weight = background + (1 - background) * face
    return weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)


def reconstruction_loss(made_BCHW: Tensor, real_BCHW: Tensor, weight: Tensor) -> Tensor:
    """What a decoder is asked for: L1 + squared error + error of the image gradients, weighted per pixel; in fp32, images in [-1, 1].

    `weight` is (S, S) or (B, 1, S, S), with mean 1.
    """
    error = made_BCHW.float() - real_BCHW
    across, down = (error[..., 1:] - error[..., :-1]).abs(), (error[..., 1:, :] - error[..., :-1, :]).abs()
    return (weight * (error.abs() + 2 * error.square())).mean() + 0.5 * ((weight[..., 1:] * across).mean() + (weight[..., 1:, :] * down).mean())


def loss_per_image(made_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor, pixel_weight_B1HW: Tensor | None) -> Tensor:
    """Weighted squared error of each image (B,), in fp32."""
    error = (made_BCHW.float() - target_BCHW.float()).square()
    if pixel_weight_B1HW is not None:
        error = error * pixel_weight_B1HW
    return weight_B * error.mean((1, 2, 3))

