"""The VAE's decoder, tuned on the portraits: how this person's face looks at the scale of pixels.

The latents of a small VAE hold too little of a face for a recogniser: decoding moves it, whatever the network drew. A decoder that has seen
the portraits puts back what is the same in all of them. It learns to undo the base's own encoder on the subject's crops, so it needs no
prompt, no noise schedule and no network but itself, and is trained apart from the method, in seconds. A third of every batch are class pictures,
where there are some, whatever the method keeps the class with: without them it draws the subject's face on others (docs/adr/0005-the-decoder-learns-too.md).

Shapes: N portraits, M class pictures, B pictures of a batch, S pixels, H latent sides, S = 8 H or whatever the VAE's factor is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from likeness.recipe import Recipe
from models.diffusion import objective as equations
from models.diffusion.bases import Base
from models.diffusion.batches import TrainingInputs
from models.diffusion.dreambooth import OfWeights
from models.diffusion.loop import Plan

PARTS = ("vae.decoder", "vae.post_quant_conv")
PREFIX = "delta.vae."              # of the tensors in an adapter's file
FACE_WEIGHT = 6.0                  # of the face, beyond 1 of what is around it: as in the maquette's own VAE
LATENT_NOISE = 0.05                # of the scaled latents: those that a UNet draws are not exactly an encoder's


def decoder_plan(recipe: Recipe) -> Plan:
    """The numbers of its loop. It writes no checkpoint: begun again, it ends the same."""
    return Plan(recipe.decoder_steps, recipe.decoder_learning_rate, recipe.max_grad_norm, checkpoint_every=recipe.decoder_steps)


class DecoderStep(OfWeights):
    """A `loop.Step`: every weight of the decoder, on windows of half a side."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: Recipe) -> None:
        super().__init__(base, PARTS)
        self._base, self._inputs, self._seed, self._batch = base, inputs, recipe.seed, recipe.batch
        face = 1 + FACE_WEIGHT * inputs.masks_NSS
        self._pixel_weight_NSS = face / face.mean((1, 2), keepdim=True)
        self._priors = max(1, recipe.batch // 2) if inputs.class_captions else 0

    def pictures(self, step: int) -> int:
        return self._batch + self._priors

    def loss(self, step: int, *, piece: int = 0, of: int = 1) -> Tensor:
        base, inputs = self._base, self._inputs
        g = torch.Generator().manual_seed((self._seed << 20) + (1 << 41) + step)
        own = torch.randint(0, len(inputs.latents_NCHW), (self._batch,), generator=g)
        x0, images, weight = inputs.latents_NCHW[own], inputs.images_NSSC[own], self._pixel_weight_NSS[own]
        if self._priors:
            others = torch.randint(0, len(inputs.class_captions), (self._priors,), generator=g)
            x0, images = torch.cat([x0, inputs.class_latents_MCHW[others]]), torch.cat([images, inputs.class_images_MSSC[others]])
            weight = torch.cat([weight, torch.ones(len(others), *weight.shape[1:])])
        x0 = x0 + LATENT_NOISE * torch.randn(x0.shape, generator=g)
        # a window of half a side: four times as many steps in the same time
        side, factor = x0.shape[-1] // 2, images.shape[1] // x0.shape[-1]
        top, left = (int(n) for n in torch.randint(0, x0.shape[-1] - side + 1, (2,), generator=g))
        mine = slice(piece, None, of)
        rows, columns = (slice(at * factor, (at + side) * factor) for at in (top, left))
        real = images[mine, rows, columns].to(base.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = x0[mine, :, top:top + side, left:left + side].to(base.device) / float(base.pipe.vae.config.scaling_factor)
        with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
            made = base.pipe.vae.decode(latents).sample
        return equations.reconstruction_loss(made, real, weight[mine, rows, columns].to(base.device)[:, None]) * (len(real) / len(x0))
