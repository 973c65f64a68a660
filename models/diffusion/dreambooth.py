"""DreamBooth (arXiv 2208.12242): every weight learns, in a copy; what is kept is the difference from the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

from likeness.recipe import DreamBooth
from models.diffusion.bases import Base
from models.diffusion.batches import Batches, TrainingInputs
from models.diffusion.loop import Group
from models.diffusion.lora import must_fit


class Weights:
    """Other weights in networks of a base, until `close`. The base's own tensors wait beside them, untouched."""

    def __init__(self, base: Base, parts: tuple[str, ...]) -> None:
        self.named: dict[str, nn.Parameter] = {f"{part}.{name}": p for part in parts for name, p in attrgetter(part)(base.pipe).named_parameters()}
        self._own = {name: p.data for name, p in self.named.items()}

    def learn(self) -> None:
        """Every weight becomes a trainable fp32 copy of itself."""
        copies = {name: own.to(torch.float32, copy=True) for name, own in self._own.items()}      # all, or out of memory before anything has changed
        for name, p in self.named.items():
            p.data = copies[name]
            p.requires_grad_(True)

    def shift(self, deltas: Mapping[str, Tensor]) -> None:
        """Every weight becomes the base's own plus its delta, in the base's own precision.

        Raises:
            BadCheckpoint: if the deltas are not those of these networks.
        """
        must_fit(self._own, deltas)
        for name, p in self.named.items():
            own = self._own[name]
            p.data = (own.float() + deltas[name].to(own.device, torch.float32)).to(own.dtype)

    def deltas(self) -> dict[str, Tensor]:
        """What was learnt: weight minus the base's own, fp32, on CPU."""
        return {name: (p.data - self._own[name].float()).cpu() for name, p in self.named.items()}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The base's own weights, for a while; not while a gradient is on its way."""
        other = {name: p.data for name, p in self.named.items()}
        try:
            for name, p in self.named.items():
                p.data = self._own[name]
            yield
        finally:
            for name, p in self.named.items():
                p.data = other[name]

    def close(self) -> None:
        """Every weight is the base's own tensor again."""
        for name, p in self.named.items():
            p.data, p.grad = self._own[name], None
            p.requires_grad_(False)


def trained_parts(base: Base, recipe: DreamBooth) -> tuple[str, ...]:
    """The networks that learn, by their names in the pipeline."""
    return ("unet", *base.towers) if recipe.text_encoder else ("unet",)


class OfWeights:
    """The part of a `loop.Step` that is the same wherever all weights of some networks learn; they do from here on, until `close`."""

    def __init__(self, base: Base, parts: tuple[str, ...]) -> None:
        self._weights = Weights(base, parts)
        self._weights.learn()

    def groups(self) -> list[Group]:
        return [Group(list(self._weights.named.values()))]

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self._weights.named.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        must_fit(dict(self._weights.named), tensors)
        for name, p in self._weights.named.items():
            p.data.copy_(tensors[name])

    def export(self) -> dict[str, Tensor]:
        return {f"delta.{name}": delta for name, delta in self._weights.deltas().items()}

    def close(self) -> None:
        self._weights.close()


class DreamBoothStep(OfWeights):
    """A `loop.Step`: all weights of the UNet, and of the text towers if asked."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: DreamBooth) -> None:
        super().__init__(base, trained_parts(base, recipe))
        self._base = base
        self._ids_KWT = base.token_ids(inputs.texts) if recipe.text_encoder else None
        self._batches = Batches(base, inputs, recipe.objective, batch=recipe.batch, seed=recipe.seed, alone=self._weights.alone)

    def pictures(self, step: int) -> int:
        return self._batches.pictures

    def loss(self, step: int, *, piece: int = 0, of: int = 1) -> Tensor:
        batch = self._batches.draw(step, piece=piece, of=of)
        # weights learn in fp32 even where the base runs in bf16: a step of 1e-5 is lost in bf16's 8 bits
        with torch.autocast(self._base.device.type, self._base.dtype, enabled=self._base.dtype != torch.float32):
            return self._batches.loss(batch, self._batches.encoded(batch) if self._ids_KWT is None else self._base.read_texts(self._ids_KWT[batch.texts_B]))
