"""Pivotal tuning: first the trigger's vectors find the place, then low-rank factors and vectors learn together from there.

The idea is that of arXiv 2106.05744, where a GAN's latent is found first and its weights are tuned around it.
"""

from __future__ import annotations

from torch import Tensor

from likeness.recipe import Pivotal
from models.diffusion.bases import Base
from models.diffusion.batches import Batches, TrainingInputs
from models.diffusion.loop import Group
from models.diffusion.lora import Factors
from models.diffusion.textual_inversion import LearntWords


class PivotalStep:
    """A `loop.Step`: vectors, and from `recipe.pivot` on factors too."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: Pivotal) -> None:
        self._base, self._recipe = base, recipe
        self._inversion = Batches(base, inputs, recipe.objective.for_words(), batch=recipe.batch, seed=recipe.seed)
        self._factors = Factors(base, recipe, seed=recipe.seed)
        self._tuning = Batches(base, inputs, recipe.objective, batch=recipe.batch, seed=recipe.seed, alone=self._factors.alone)
        self._words = LearntWords(base, recipe, noun=inputs.noun)
        self._ids_KWT = base.token_ids(inputs.texts)

    def groups(self) -> list[Group]:
        recipe = self._recipe
        return [Group(self._words.parameters, rate=recipe.vectors_learning_rate / recipe.learning_rate), Group(self._factors.parameters, first_step=recipe.pivot)]

    def pictures(self, step: int) -> int:
        return self._batches(step).pictures

    def loss(self, step: int, *, piece: int = 0, of: int = 1) -> Tensor:
        self._factors.enable(step >= self._recipe.pivot)
        batches = self._batches(step)
        batch = batches.draw(step, piece=piece, of=of)
        return batches.loss(batch, self._base.read_texts(self._ids_KWT[batch.texts_B]))

    def _batches(self, step: int) -> Batches:
        return self._tuning if step >= self._recipe.pivot else self._inversion

    def state(self) -> dict[str, Tensor]:
        return self._words.state() | self._factors.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        words = {k: v for k, v in tensors.items() if k.startswith("raw")}
        self._words.restore(words)
        self._factors.restore({k: v for k, v in tensors.items() if k not in words})

    def export(self) -> dict[str, Tensor]:
        return self._words.export() | self._factors.state()

    def close(self) -> None:
        self._words.close()
        self._factors.close()
