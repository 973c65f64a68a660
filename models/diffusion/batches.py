"""What a step sees: portraits under their captions, class pictures beside them, noise, timesteps, weights. One home for all methods.

Everything random is drawn from a generator seeded by (recipe's seed, step), on the CPU, so that a step is the same wherever and whenever it
is taken. Pictures are never flipped: a face is not symmetric, and a parting on the wrong side is somebody else.

Shapes: N portraits, M class pictures, B pictures of a batch, S pixels, C latent channels, H and W latent sides, T tokens of width D.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likeness.recipe import InversionObjective, Objective
from models.diffusion import objective as equations
from models.diffusion.bases import Base
from models.diffusion.families import Texts


@dataclass(frozen=True)
class TrainingInputs:
    """Everything the loop reads, encoded once. CPU tensors."""

    images_NSSC: Tensor           # uint8 RGB
    latents_NCHW: Tensor
    masks_NSS: Tensor             # face masks in [0, 1]
    captions: tuple[str, ...]
    class_images_MSSC: Tensor     # uint8 RGB
    class_latents_MCHW: Tensor
    class_captions: tuple[str, ...]
    plain_captions: tuple[str, ...]     # those of the portraits, the noun in the trigger's place
    encoded: Texts                # `texts` as the base alone reads them: 2 N + M + 1
    noun: str
    originals_px_N: Tensor        # sides of the portraits as they lay in their photos

    @property
    def texts(self) -> list[str]:
        """All texts: those of the portraits, those of the class pictures, the empty one, those of the portraits without the trigger."""
        return [*self.captions, *self.class_captions, "", *self.plain_captions]


@dataclass(frozen=True)
class Batch:
    """One draw, on the device, the portraits first."""

    noisy_BCHW: Tensor
    aim_BCHW: Tensor              # what the network should return
    t_B: Tensor
    texts_B: Tensor               # numbers of texts, on the CPU
    weight_B: Tensor
    pixel_B1HW: Tensor
    original_px_B: Tensor         # sides of the pictures before they were brought to the base's resolution
    portraits: int                # how many of B
    shares: tuple[float, float] = (1.0, 1.0)      # of the step's portraits, and of its other pictures, that are in this batch


def encode(base: Base, *, crops_NSSC: np.ndarray[Any, Any], masks_NSS: np.ndarray[Any, Any], captions: list[str],
           class_images_MSSC: np.ndarray[Any, Any], class_captions: list[str], noun: str, originals_px: Sequence[float] | None = None) -> TrainingInputs:
    """Run VAE and text towers once over everything (uint8 RGB images; masks uint8, 255 = face). M may be 0.

    Args:
        originals_px: sides of the portraits as they lay in their photos; None: they were as large as the base draws.
    """
    sides = torch.tensor(originals_px if originals_px is not None else [base.ref.resolution_px] * len(captions), dtype=torch.float32)
    plain = [without_trigger(caption, trigger=base.trigger, noun=noun) for caption in captions]
    crops, class_images = torch.from_numpy(crops_NSSC), torch.from_numpy(class_images_MSSC)
    return TrainingInputs(
        crops, base.encode_images(crops), torch.from_numpy(masks_NSS).float() / 255, tuple(captions),
        class_images, base.encode_images(class_images), tuple(class_captions), tuple(plain),
        Texts.cat([base.encode_texts(texts) for texts in (captions, class_captions, [""], plain) if texts]), noun, sides)


def without_trigger(caption: str, *, trigger: str, noun: str) -> str:
    """"a photo of a zqaa woman" -> "a photo of a woman"; a trigger alone becomes the noun."""
    return re.sub(rf"\b{re.escape(trigger)}\b(\s+{re.escape(noun)}\b)?", noun, caption, flags=re.IGNORECASE)


class Batches:
    """Draws batches and measures a network's error on them. `alone` is the method's way to let the base be what it was, for a while."""

    def __init__(self, base: Base, inputs: TrainingInputs, objective: InversionObjective, *, batch: int, seed: int,
                 alone: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.base, self.inputs, self.objective, self.batch, self.seed, self._alone = base, inputs, objective, batch, seed, alone
        height, width = inputs.latents_NCHW.shape[2:]
        self._weights = equations.mask_weight(inputs.masks_NSS, height=height, width=width, background=objective.background_weight)
        self._prior_weight, self._dropout = (objective.prior_weight, objective.caption_dropout) if isinstance(objective, Objective) else (0.0, 0.0)
        self._priors = max(1, batch // 2) if self._prior_weight > 0 else 0
        self._dop = isinstance(objective, Objective) and objective.prior == "dop"

    @property
    def pictures(self) -> int:
        """How many pictures a step has."""
        return self.batch + self._priors

    def draw(self, step: int, *, piece: int = 0, of: int = 1) -> Batch:
        """`batch` portraits and half as many class pictures, or for dop the first of the portraits again, noised.

        With `of`, one of so many pieces of them, at most as many as there are pictures: the losses of all pieces add up to that of the whole.
        """
        whole, total = self._draw(step), self.pictures
        if of == 1:
            return whole
        first, end = piece * total // of, (piece + 1) * total // of
        own = max(0, min(end, self.batch) - first)
        part = slice(first, end)
        return Batch(whole.noisy_BCHW[part], whole.aim_BCHW[part], whole.t_B[part], whole.texts_B[part], whole.weight_B[part], whole.pixel_B1HW[part],
                     whole.original_px_B[part], own, (own / self.batch, (end - first - own) / max(1, self._priors)))

    def _draw(self, step: int) -> Batch:
        inputs, device = self.inputs, self.base.device
        g = torch.Generator().manual_seed((self.seed << 20) + step)
        portraits = self._portraits(step)
        n, m = len(inputs.captions), len(inputs.class_captions)
        if self._dop or not self._priors:
            again = portraits[: self._priors]
            second, texts = inputs.latents_NCHW[again], torch.cat([portraits, again + n + m + 1])
            sides = inputs.originals_px_N[torch.cat([portraits, again])]
        else:
            priors = torch.randint(0, m, (self._priors,), generator=g)
            second, texts = inputs.class_latents_MCHW[priors], torch.cat([portraits, priors + n])
            sides = torch.cat([inputs.originals_px_N[portraits], torch.full((self._priors,), float(self.base.ref.resolution_px))])
        x0 = torch.cat([inputs.latents_NCHW[portraits], second])
        dropped = torch.rand(len(x0), generator=g) < self._dropout
        texts = torch.where(dropped, n + m, texts)
        noise = torch.randn(x0.shape, generator=g)
        if self.objective.noise_offset:
            noise = noise + self.objective.noise_offset * torch.randn((*x0.shape[:2], 1, 1), generator=g)
        total = len(self.base.alphas_cumprod)
        t = torch.cat([equations.stratified_timesteps(count, total=total, generator=g) for count in (self.batch, self._priors) if count]).to(device)
        alpha_bar = self.base.alphas_cumprod[t]
        x0, noise = x0.to(device), noise.to(device)
        prediction = self.base.ref.prediction
        return Batch(equations.add_noise(x0, noise, alpha_bar).to(self.base.dtype), equations.target(x0, noise, alpha_bar, prediction), t, texts,
                     equations.snr_weight(alpha_bar, prediction, self.objective.min_snr),
                     torch.cat([self._weights[portraits], torch.ones(self._priors, *self._weights.shape[1:])]).to(device), sides, self.batch)

    def encoded(self, batch: Batch) -> Texts:
        """The batch's texts as they were encoded once."""
        return self.inputs.encoded[batch.texts_B].to(self.base.device, self.base.dtype)

    def loss(self, batch: Batch, texts: Texts) -> Tensor:
        """Mean weighted error on the portraits, plus prior_weight times that on the class pictures (dop: the distance from what the base alone returns)."""
        own, aim = batch.portraits, batch.aim_BCHW
        others = len(aim) - own
        if self._dop and others:
            with torch.no_grad(), self._alone():
                again = self.base.denoise(batch.noisy_BCHW[own:], batch.t_B[own:], self.encoded(batch)[own:], original_px_B=batch.original_px_B[own:])
                aim = torch.cat([aim[:own], again])
        made = self.base.denoise(batch.noisy_BCHW, batch.t_B, texts, original_px_B=batch.original_px_B)
        each = equations.loss_per_image(made, aim, batch.weight_B, batch.pixel_B1HW)
        own_share, others_share = batch.shares
        terms = [each[:own].mean() * own_share] if own else []
        if others:
            terms.append(self._prior_weight * (each[own:].mean() * others_share))
        return terms[0] + terms[1] if len(terms) == 2 else terms[0]

    def _portraits(self, step: int) -> Tensor:
        """Every portrait once per round, in an order drawn per round: no portrait is seen twice as often as another."""
        n = len(self.inputs.latents_NCHW)
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {r: torch.randperm(n, generator=torch.Generator().manual_seed((self.seed << 20) + (1 << 40) + r)) for r in {p // n for p in places}}
        return torch.stack([orders[p // n][p % n] for p in places])
