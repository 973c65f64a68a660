"""What a step sees: portraits under their captions, class pictures beside them, noise, timesteps, weights. One home for all methods.

Everything random is drawn from a generator seeded by (recipe's seed, step), on the CPU, so that a step is the same wherever and whenever it
is taken. Pictures are never flipped: a face is not symmetric, and a parting on the wrong side is somebody else.

Shapes: N portraits, M class pictures, B pictures of a batch, S pixels, C latent channels, H and W latent sides, T tokens of width D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likeness.recipe import InversionObjective, Objective
from models.diffusion import objective as equations
from models.diffusion.bases import Base


@dataclass(frozen=True)
class TrainingInputs:
    """Everything the loop reads, encoded once. CPU tensors."""

    latents_NCHW: Tensor
    masks_NSS: Tensor             # face masks in [0, 1]
    captions: tuple[str, ...]
    class_latents_MCHW: Tensor
    class_captions: tuple[str, ...]
    texts_KTD: Tensor             # states of `texts`, for methods that leave the text tower alone: K = N + M + 1
    noun: str

    @property
    def texts(self) -> list[str]:
        """All texts: those of the portraits, those of the class pictures, the empty one."""
        return [*self.captions, *self.class_captions, ""]


@dataclass(frozen=True)
class Batch:
    """One draw, on the device, the portraits first."""

    noisy_BCHW: Tensor
    aim_BCHW: Tensor              # what the network should return
    t_B: Tensor
    texts_B: Tensor               # numbers of texts, on the CPU
    weight_B: Tensor
    pixel_B1HW: Tensor
    portraits: int                # how many of B


def encode(base: Base, *, crops_NSSC: np.ndarray[Any, Any], masks_NSS: np.ndarray[Any, Any], captions: list[str],
           class_images_MSSC: np.ndarray[Any, Any], class_captions: list[str], noun: str) -> TrainingInputs:
    """Run VAE and text tower once over everything (uint8 RGB images; masks uint8, 255 = face). M may be 0."""
    return TrainingInputs(
        base.encode_images(torch.from_numpy(crops_NSSC)), torch.from_numpy(masks_NSS).float() / 255, tuple(captions),
        base.encode_images(torch.from_numpy(class_images_MSSC)), tuple(class_captions),
        torch.cat([base.encode_texts(texts) for texts in (captions, class_captions, [""]) if texts]), noun)


class Batches:
    """Draws batches and measures a network's error on them."""

    def __init__(self, base: Base, inputs: TrainingInputs, objective: InversionObjective, *, batch: int, seed: int) -> None:
        self.base, self.inputs, self.objective, self.batch, self.seed = base, inputs, objective, batch, seed
        height, width = inputs.latents_NCHW.shape[2:]
        self._weights = equations.mask_weight(inputs.masks_NSS, height=height, width=width, background=objective.background_weight)
        self._prior_weight, self._dropout = (objective.prior_weight, objective.caption_dropout) if isinstance(objective, Objective) else (0.0, 0.0)
        self._priors = max(1, batch // 2) if self._prior_weight > 0 else 0

    def draw(self, step: int) -> Batch:
        """`batch` portraits and half as many class pictures, noised."""
        inputs, device = self.inputs, self.base.device
        g = torch.Generator().manual_seed((self.seed << 20) + step)
        portraits = self._portraits(step)
        priors = torch.randint(0, len(inputs.class_latents_MCHW), (self._priors,), generator=g) if self._priors else torch.empty(0, dtype=torch.long)
        x0 = torch.cat([inputs.latents_NCHW[portraits], inputs.class_latents_MCHW[priors]])
        dropped = torch.rand(len(x0), generator=g) < self._dropout
        texts = torch.where(dropped, len(inputs.texts_KTD) - 1, torch.cat([portraits, priors + len(inputs.captions)]))
        noise = torch.randn(x0.shape, generator=g)
        if self.objective.noise_offset:
            noise = noise + self.objective.noise_offset * torch.randn((*x0.shape[:2], 1, 1), generator=g)
        total = len(self.base.alphas_cumprod)
        t = torch.cat([equations.stratified_timesteps(n, total=total, generator=g) for n in (self.batch, self._priors) if n]).to(device)
        alpha_bar = self.base.alphas_cumprod[t]
        x0, noise = x0.to(device), noise.to(device)
        prediction = self.base.ref.prediction
        return Batch(equations.add_noise(x0, noise, alpha_bar).to(self.base.dtype), equations.target(x0, noise, alpha_bar, prediction), t, texts,
                     equations.snr_weight(alpha_bar, prediction, self.objective.min_snr),
                     torch.cat([self._weights[portraits], torch.ones(self._priors, *self._weights.shape[1:])]).to(device), self.batch)

    def encoded(self, batch: Batch) -> Tensor:
        """The batch's texts (B, T, D) as they were encoded once."""
        return self.inputs.texts_KTD[batch.texts_B].to(self.base.device, self.base.dtype)

    def loss(self, batch: Batch, text_BTD: Tensor) -> Tensor:
        """Mean weighted error on the portraits, plus prior_weight times that on the class pictures."""
        made = self.base.unet(batch.noisy_BCHW, batch.t_B, text_BTD).sample
        each = equations.loss_per_image(made, batch.aim_BCHW, batch.weight_B, batch.pixel_B1HW)
        own, prior = each[: batch.portraits].mean(), each[batch.portraits:]
        return own + self._prior_weight * prior.mean() if len(prior) else own

    def _portraits(self, step: int) -> Tensor:
        """Every portrait once per round, in an order drawn per round: no portrait is seen twice as often as another."""
        n = len(self.inputs.latents_NCHW)
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {r: torch.randperm(n, generator=torch.Generator().manual_seed((self.seed << 20) + (1 << 40) + r)) for r in {p // n for p in places}}
        return torch.stack([orders[p // n][p % n] for p in places])
