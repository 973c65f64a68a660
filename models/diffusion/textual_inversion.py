"""Textual Inversion (arXiv 2208.01618): new vectors for the trigger, learnt through a network that does not move.

The vectors lie beside the base's embedding, not in it: while they are in place, the trigger is spelt as k tokens that the vocabulary does
not have, and a lookup past its end finds the vectors. So no row of the base can change, whatever an optimizer does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn

from likeness.recipe import NewWords, TextualInversion
from models.diffusion.bases import Base
from models.diffusion.batches import Batches, TrainingInputs
from models.diffusion.loop import Group
from models.diffusion.lora import must_fit


class Lookup(nn.Module):
    """An embedding whose tokens from `first` on are other vectors."""

    def __init__(self, known: nn.Embedding, vectors_KD: Callable[[], Tensor], *, first: int) -> None:
        super().__init__()
        self.known, self._vectors_KD, self._first = known, vectors_KD, first

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        new_BT1 = (ids_BT >= self._first).unsqueeze(-1)
        new = F.embedding((ids_BT - self._first).clamp(min=0), self._vectors_KD())
        known: Tensor = self.known(ids_BT.clamp(max=self._first - 1))
        return torch.where(new_BT1, new.to(known.dtype), known)


class Words:
    """The vectors of one word in a base, until `close`."""

    def __init__(self, base: Base, word: str, vectors_KD: Callable[[], Tensor], *, count: int) -> None:
        self._base, self._word = base, word
        self._tokenizer, self._table = base.pipe.tokenizer, base.pipe.text_encoder.get_input_embeddings()
        tokens = [f"<{word}-{i}>" for i in range(count)]
        base.pipe.tokenizer = copy.deepcopy(self._tokenizer)
        base.pipe.tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        base.pipe.text_encoder.set_input_embeddings(Lookup(self._table, vectors_KD, first=len(self._tokenizer)))
        base.spelling[word] = " ".join(tokens)

    def close(self) -> None:
        """Tokenizer and embedding are the base's own objects again."""
        del self._base.spelling[self._word]
        self._base.pipe.text_encoder.set_input_embeddings(self._table)
        self._base.pipe.tokenizer = self._tokenizer


class LearntWords:
    """Vectors (K, D) that learn: what is trained is free, what is used has a norm near the vocabulary's."""

    def __init__(self, base: Base, recipe: NewWords, *, noun: str) -> None:
        table = base.pipe.text_encoder.get_input_embeddings().weight.detach().float()
        ids = base.pipe.tokenizer(noun, add_special_tokens=False).input_ids
        median = table.norm(dim=1).median()
        self._least, self._most = median * (1 - recipe.norm_slack), median * (1 + recipe.norm_slack)
        self.raw_KD = nn.Parameter(table[ids].mean(0).repeat(recipe.vectors, 1))        # equal at first: their places in the prompt part them
        self._name = f"vectors.{base.trigger}"
        self._words = Words(base, base.trigger, self.used, count=recipe.vectors)

    def used(self) -> Tensor:
        """Norms brought within the limits, w * min(max(|w|, least), most) / |w|: beyond the limits only the direction learns."""
        norm = self.raw_KD.norm(dim=1, keepdim=True).clamp(min=1e-8)
        used: Tensor = self.raw_KD * norm.clamp(self._least, self._most) / norm
        return used

    def state(self) -> dict[str, Tensor]:
        return {"raw": self.raw_KD.detach().cpu().clone()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved vectors in.

        Raises:
            BadCheckpoint: if their number or width is another.
        """
        must_fit(self.state(), tensors)
        self.raw_KD.data.copy_(tensors["raw"])

    def export(self) -> dict[str, Tensor]:
        return {self._name: self.used().detach().cpu().clone()}

    def close(self) -> None:
        self._words.close()


class TextualInversionStep:
    """A `loop.Step`: vectors alone. The text tower runs in every step, because every step changes what it reads."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: TextualInversion) -> None:
        self._base = base
        self._batches = Batches(base, inputs, recipe.objective, batch=recipe.batch, seed=recipe.seed)
        self._words = LearntWords(base, recipe, noun=inputs.noun)
        self._ids_KT = base.token_ids(inputs.texts)

    def groups(self) -> list[Group]:
        return [Group([self._words.raw_KD])]

    def loss(self, step: int) -> Tensor:
        batch = self._batches.draw(step)
        return self._batches.loss(batch, self._base.text_states(self._ids_KT[batch.texts_B]))

    def state(self) -> dict[str, Tensor]:
        return self._words.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._words.restore(tensors)

    def export(self) -> dict[str, Tensor]:
        return self._words.export()

    def close(self) -> None:
        self._words.close()
