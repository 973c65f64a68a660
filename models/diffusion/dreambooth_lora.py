"""DreamBooth-LoRA: the subject's portraits under a trigger word, class pictures beside them, low-rank factors in the UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from likeness.recipe import Lora
from models.diffusion import lora, objective
from models.diffusion.bases import Base


@dataclass(frozen=True)
class TrainingInputs:
    """Everything the loop reads, encoded once: N portraits, M class pictures. CPU tensors; T tokens of width D."""

    latents_NCHW: Tensor
    masks_NSS: Tensor             # face masks in [0, 1]
    texts_NTD: Tensor
    class_latents_MCHW: Tensor
    class_texts_MTD: Tensor
    empty_1TD: Tensor


def encode(base: Base, *, crops_NSSC: np.ndarray[Any, Any], masks_NSS: np.ndarray[Any, Any], captions: list[str],
           class_images_MSSC: np.ndarray[Any, Any], class_captions: list[str]) -> TrainingInputs:
    """Run VAE and text tower once over everything (uint8 RGB images; masks uint8, 255 = face)."""
    return TrainingInputs(
        base.encode_images(torch.from_numpy(crops_NSSC)), torch.from_numpy(masks_NSS).float() / 255, base.encode_texts(captions),
        base.encode_images(torch.from_numpy(class_images_MSSC)), base.encode_texts(class_captions), base.encode_texts([""]))


class DreamBoothLora:
    """A `loop.Step`."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: Lora, *, name: str = "subject") -> None:
        self.base, self.inputs, self.recipe, self.name = base, inputs, recipe, name
        self._parameters = lora.attach(base.unet, recipe, name=name)
        n, (height, width) = len(inputs.latents_NCHW), inputs.latents_NCHW.shape[2:]
        self._weights = objective.mask_weight(inputs.masks_NSS, height=height, width=width, background=recipe.objective.background_weight)
        self._priors = max(1, recipe.batch // 2) if recipe.objective.prior_weight > 0 else 0
        self._rounds = max(1, n)

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def loss(self, step: int) -> Tensor:
        """Mean weighted error of `batch` portraits, plus prior_weight times that of half as many class pictures."""
        recipe, inputs, device = self.recipe, self.inputs, self.base.device
        g = torch.Generator().manual_seed((recipe.seed << 20) + step)
        portraits = self._portraits(step, recipe.batch)
        priors = torch.randint(0, len(inputs.class_latents_MCHW), (self._priors,), generator=g)
        x0 = torch.cat([inputs.latents_NCHW[portraits], inputs.class_latents_MCHW[priors]])
        text = torch.cat([inputs.texts_NTD[portraits], inputs.class_texts_MTD[priors]])
        dropped = torch.rand(len(text), generator=g) < recipe.objective.caption_dropout
        text = torch.where(dropped.view(-1, 1, 1), inputs.empty_1TD, text)
        noise = torch.randn(x0.shape, generator=g)
        if recipe.objective.noise_offset:
            noise = noise + recipe.objective.noise_offset * torch.randn((*x0.shape[:2], 1, 1), generator=g)
        total = len(self.base.alphas_cumprod)
        t = torch.cat([objective.stratified_timesteps(n, total=total, generator=g) for n in (recipe.batch, self._priors) if n])
        alpha_bar = self.base.alphas_cumprod[t.to(device)]
        x0, noise, text = x0.to(device), noise.to(device), text.to(device, self.base.dtype)
        noisy = objective.add_noise(x0, noise, alpha_bar).to(self.base.dtype)
        made = self.base.unet(noisy, t.to(device), text).sample
        aim = objective.target(x0, noise, alpha_bar, self.base.ref.prediction)
        weight = objective.snr_weight(alpha_bar, self.base.ref.prediction, recipe.objective.min_snr)
        pixel = torch.cat([self._weights[portraits], torch.ones(self._priors, *self._weights.shape[1:])]).to(device)
        each = objective.loss_per_image(made, aim, weight, pixel)
        own, prior = each[: recipe.batch].mean(), each[recipe.batch:]
        return own + recipe.objective.prior_weight * prior.mean() if self._priors else own

    def _portraits(self, step: int, batch: int) -> Tensor:
        """Every portrait once per round, in an order drawn per round: no portrait is seen twice as often as another."""
        n = self._rounds
        places = range(step * batch, (step + 1) * batch)
        orders = {r: torch.randperm(n, generator=torch.Generator().manual_seed((self.recipe.seed << 20) + (1 << 40) + r)) for r in {p // n for p in places}}
        return torch.stack([orders[p // n][p % n] for p in places])

    def state(self) -> dict[str, Tensor]:
        return lora.state(self.base.unet, name=self.name)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        lora.restore(self.base.unet, tensors, name=self.name)

    def close(self) -> None:
        lora.detach(self.base.unet, name=self.name)
