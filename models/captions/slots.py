"""Captions by slot filling: the base's own CLIP says what each portrait shows, and the vocabulary says it in words.

A slot is named only when CLIP is sure of it; what says *who* somebody is (hair, beard, age) is never named, so that it goes into the
trigger word, and what must stay editable (place, light, clothes, expression, glasses, hat) is named, so that it does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from models.captions.captioner import Captioner, Said
from models.maquette.vocabulary import SLOTS, compose, slot_prompt

EDITABLE = tuple(name for name, slot in SLOTS.items() if not slot.identity)
READ = 40                  # words: a CLIP text tower reads 75 tokens, and a long word has several
MIN_PROBABILITY = 0.6      # below it a slot is left out: a wrong word teaches the base a wrong meaning, a missing one only costs some editability


@dataclass
class SlotReader:
    """Zero-shot classification of portraits by the slots of the vocabulary."""

    clip: CLIPModel
    texts: Mapping[str, Tensor]         # slot -> (values, D), normalised
    wide: ClassVar[bool] = False        # it was taught on tight crops

    @staticmethod
    def load(folder: Path) -> SlotReader:
        """Read CLIP and its tokenizer from `folder` (safetensors) and embed every slot's phrases once."""
        transformers_logging.disable_progress_bar()       # the bars of a run are ours
        clip = CLIPModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
        words = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        texts: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, slot in SLOTS.items():
                ids = words([slot_prompt(name, value) for value in slot.phrases], padding="max_length", truncation=True, return_tensors="pt").input_ids
                texts[name] = F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=1)
        return SlotReader(clip, texts)

    @torch.no_grad()
    def embed(self, crops_NSSC: NDArray[np.uint8]) -> Tensor:
        """Normalised image features (N, D) of uint8 RGB crops."""
        side: int = self.clip.config.vision_config.image_size
        x = torch.from_numpy(np.array(crops_NSSC)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if x.shape[-1] != side:
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        features = [self.clip.visual_projection(self.clip.vision_model(pixel_values=p).pooler_output) for p in x.split(32)]
        return F.normalize(torch.cat(features), dim=1)

    def read(self, crops_NSSC: NDArray[np.uint8]) -> list[dict[str, tuple[str, float]]]:
        """For each crop, each slot's most probable value and its probability."""
        features = self.embed(crops_NSSC)
        scale = self.clip.logit_scale.exp()
        answers: list[dict[str, tuple[str, float]]] = [{} for _ in range(len(features))]
        for name, texts in self.texts.items():
            probabilities = (scale * features @ texts.T).softmax(1)
            best, index = probabilities.max(1)
            values = list(SLOTS[name].phrases)
            for answer, p, i in zip(answers, best.tolist(), index.tolist(), strict=True):
                answer[name] = (values[i], p)
        return answers

    def sure(self, crops_NSSC: NDArray[np.uint8]) -> list[dict[str, str]]:
        """For each crop, the value of each slot of which CLIP is surer than MIN_PROBABILITY."""
        return [{name: value for name, (value, p) in answer.items() if p >= MIN_PROBABILITY} for answer in self.read(crops_NSSC)]

    def captions(self, crops_NSSC: NDArray[np.uint8], *, who: str) -> list[Said]:
        """For each crop, a caption of the slots of which CLIP is sure."""
        return [(*caption(answer, who=who), "slots") for answer in self.read(crops_NSSC)]


def caption(answer: Mapping[str, tuple[str, float]], *, who: str, min_probability: float = MIN_PROBABILITY) -> tuple[str, dict[str, str]]:
    """(caption, the slots it names) of one portrait; `who` stands for the person, e.g. "zqaa woman"."""
    named = {name: answer[name][0] for name in EDITABLE if answer[name][1] >= min_probability}
    attributes: dict[str, Any] = {"style": "photo", **named, "place_colour": "none", "pattern": "plain"}
    if attributes["style"] != "photo" and answer["style"][1] < 0.9:
        attributes["style"] = "photo"
    return compose(attributes, who=who, keep=frozenset(named) | {"style"}), named


def subject_captions(captioner: Captioner, crops_NSSC: NDArray[np.uint8], sidecars: Sequence[str | None], *, who: str) -> list[Said]:
    """A caption of each crop; the words of a sidecar file win, with `who` put before them unless they name it where a text tower still reads (in their first READ words)."""
    own = [" ".join(sidecar.split()) if sidecar else "" for sidecar in sidecars]
    unsaid = [i for i, words in enumerate(own) if not words]
    said = iter(captioner.captions(crops_NSSC[unsaid], who=who) if unsaid else ())
    named = re.compile(rf"(?<!\w){re.escape(who)}(?!\w)", re.IGNORECASE)
    return [(named.sub(who, words) if named.search(" ".join(words.split()[:READ])) else f"a photo of {who}, {words}", {}, "sidecar") if words else next(said) for words in own]
