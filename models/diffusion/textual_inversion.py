"""Textual Inversion (arXiv 2208.01618): new vectors for the trigger, learnt through a network that does not move.

The vectors lie beside the base's embedding, not in it: while they are in place, the trigger is spelt as k tokens that the vocabulary does
not have, and a lookup past its end finds the vectors. So no row of the base can change, whatever an optimizer does. A base with two text
towers has vectors of the word for each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """The vectors of one word in every text tower of a base, until `close`."""

    def __init__(self, base: Base, word: str, vectors: Sequence[Callable[[], Tensor]], *, count: int) -> None:
        """`vectors` gives for each tower, in order, `count` vectors of its own width (K, D)."""
        self._base, self._word = base, word
        self._tokenizers = {f"tokenizer{end}": getattr(base.pipe, f"tokenizer{end}") for end in base.family.ends}
        self._tables = {name: tower.get_input_embeddings() for name, tower in base.towers.items()}
        tokens = [f"<{word}-{i}>" for i in range(count)]
        for tower, own, vectors_KD, (name, tokenizer) in zip(base.towers.values(), self._tables.values(), vectors, self._tokenizers.items(), strict=True):
            longer = copy.deepcopy(tokenizer)
            longer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
            setattr(base.pipe, name, longer)
            tower.set_input_embeddings(Lookup(own, vectors_KD, first=len(tokenizer)))
        base.spelling[word] = " ".join(tokens)

    def close(self) -> None:
        """Tokenizers and embeddings are the base's own objects again."""
        del self._base.spelling[self._word]
        for name, table in self._tables.items():
            self._base.towers[name].set_input_embeddings(table)
        for name, tokenizer in self._tokenizers.items():
            setattr(self._base.pipe, name, tokenizer)


def put_words(base: Base, tensors: Mapping[str, Tensor], *, count: int) -> Words:
    """An adapter's vectors in the base, `count` for each text tower, until closed.

    Raises:
        BadCheckpoint: if they are not so many, or not of this base.
    """
    word = next(iter(tensors)).partition(".")[2]
    wanted = {f"vectors{end}.{word}": torch.empty(count, tower.config.hidden_size) for end, tower in zip(base.family.ends, base.towers.values(), strict=True)}
    must_fit(wanted, tensors)
    held = [tensors[name].to(base.device) for name in wanted]
    return Words(base, word, [functools.partial(_itself, vectors) for vectors in held], count=count)


def _itself(vectors_KD: Tensor) -> Tensor:
    return vectors_KD


class LearntVectors:
    """Vectors (K, D) of one tower that learn: what is trained is free, what is used has a norm near the vocabulary's."""

    def __init__(self, tower: Any, tokenizer: Any, recipe: NewWords, *, noun: str) -> None:
        table = tower.get_input_embeddings().weight.detach().float()
        ids = tokenizer(noun, add_special_tokens=False).input_ids
        median = table.norm(dim=1).median()
        self._least, self._most = median * (1 - recipe.norm_slack), median * (1 + recipe.norm_slack)
        self.raw_KD = nn.Parameter(table[ids].mean(0).repeat(recipe.vectors, 1))        # equal at first: their places in the prompt part them

    def used(self) -> Tensor:
        """Norms brought within the limits, w * min(max(|w|, least), most) / |w|: beyond the limits only the direction learns."""
        norm = self.raw_KD.norm(dim=1, keepdim=True).clamp(min=1e-8)
        used: Tensor = self.raw_KD * norm.clamp(self._least, self._most) / norm
        return used


class LearntWords:
    """One word's vectors, of every text tower, while they learn."""

    def __init__(self, base: Base, recipe: NewWords, *, noun: str) -> None:
        self._vectors = {end: LearntVectors(getattr(base.pipe, f"text_encoder{end}"), getattr(base.pipe, f"tokenizer{end}"), recipe, noun=noun)
                         for end in base.family.ends}
        self._word = base.trigger
        self._words = Words(base, base.trigger, [v.used for v in self._vectors.values()], count=recipe.vectors)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [v.raw_KD for v in self._vectors.values()]

    def state(self) -> dict[str, Tensor]:
        return {f"raw{end}": v.raw_KD.detach().cpu().clone() for end, v in self._vectors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved vectors in.

        Raises:
            BadCheckpoint: if their number or width is another.
        """
        must_fit(self.state(), tensors)
        for end, v in self._vectors.items():
            v.raw_KD.data.copy_(tensors[f"raw{end}"])

    def export(self) -> dict[str, Tensor]:
        return {f"vectors{end}.{self._word}": v.used().detach().cpu().clone() for end, v in self._vectors.items()}

    def close(self) -> None:
        self._words.close()


class TextualInversionStep:
    """A `loop.Step`: vectors alone. The text towers run in every step, because every step changes what they read."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: TextualInversion) -> None:
        self._base = base
        self._batches = Batches(base, inputs, recipe.objective, batch=recipe.batch, seed=recipe.seed)
        self._words = LearntWords(base, recipe, noun=inputs.noun)
        self._ids_KWT = base.token_ids(inputs.texts)

    def groups(self) -> list[Group]:
        return [Group(self._words.parameters)]

    def pictures(self, step: int) -> int:
        return self._batches.pictures

    def loss(self, step: int, *, piece: int = 0, of: int = 1) -> Tensor:
        batch = self._batches.draw(step, piece=piece, of=of)
        return self._batches.loss(batch, self._base.read_texts(self._ids_KWT[batch.texts_B]))

    def state(self) -> dict[str, Tensor]:
        return self._words.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._words.restore(tensors)

    def export(self) -> dict[str, Tensor]:
        return self._words.export()

    def close(self) -> None:
        self._words.close()
