"""Bases: pretrained text-to-image pipelines, pinned, loaded once and kept resident.

A base comes from the package (the maquette) or from a local folder in diffusers layout. Only safetensors are read, remote code never
runs, and every file's sha256 becomes part of the BaseRef, so a changed weight is a changed base.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from likeness.errors import IntegrityError, UnknownBase
from likeness.records import BaseRef

MAQUETTE = Path(__file__).parents[1] / "maquette"
READ = {".safetensors", ".json", ".txt"}      # what a base is made of; anything else in its folder is ignored


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    folder: Path | None                      # None: the user must say where it lies
    family: Literal["sd15"]
    resolution_px: int
    trigger: str                             # a word that is one token and means nothing to this base
    guidance: float
    licence: str
    framings: tuple[Literal["tight", "wide"], ...] = ("tight", "wide")      # of the portraits it is trained on


CATALOGUE: Mapping[str, Entry] = {
    "maquette": Entry(MAQUETTE / "weights", "sd15", 128, "zqaa", 3.0, "Apache-2.0; trained on CC0 renders, no real person", ("tight",)),
    "sd15": Entry(None, "sd15", 512, "sks", 7.0, "CreativeML Open RAIL-M"),
}


@dataclass
class Base:
    """A resident pipeline: frozen modules in fp32 on CPU, bf16 on GPU, with what training and sampling need to know of it."""

    ref: BaseRef
    pipe: Any                                # StableDiffusionPipeline
    trigger: str
    guidance: float
    device: torch.device
    dtype: torch.dtype
    spelling: dict[str, str] = field(default_factory=dict)       # words that stand for other tokens while an adapter with words is in place

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) on the device, fp32; the last is 0 for a zero-terminal-SNR base."""
        return torch.as_tensor(self.pipe.scheduler.alphas_cumprod, dtype=torch.float32).to(self.device)

    @torch.no_grad()
    def encode_images(self, images_BHWC: Tensor) -> Tensor:
        """uint8 RGB (B, S, S, 3) -> scaled latent means (B, 4, S/8, S/8), fp32, on CPU."""
        if not len(images_BHWC):
            side = self.ref.resolution_px // self.pipe.vae_scale_factor
            return torch.zeros(0, self.pipe.vae.config.latent_channels, side, side)
        x = images_BHWC.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        parts: list[Tensor] = [self.pipe.vae.encode(p).latent_dist.mean for p in x.split(8)]
        return (torch.cat(parts) * float(self.pipe.vae.config.scaling_factor)).float().cpu()

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Prompts -> text-tower states (B, T, D), fp32, on CPU."""
        return torch.cat([self.text_states(ids) for ids in self.token_ids(texts).split(64)]).float().cpu()

    def token_ids(self, texts: list[str]) -> Tensor:
        """Prompts -> token numbers (B, T), on CPU. Longer prompts than T tokens are cut, as the pipeline does."""
        words = self.pipe.tokenizer
        ids: Tensor = words([self.spell(t) for t in texts], padding="max_length", truncation=True, max_length=words.model_max_length, return_tensors="pt").input_ids
        return ids

    def text_states(self, ids_BT: Tensor) -> Tensor:
        """Token numbers -> text-tower states (B, T, D) on the device, with whatever gradient the tower has."""
        states: Tensor = self.pipe.text_encoder(ids_BT.to(self.device))[0]
        return states

    def spell(self, text: str) -> str:
        """`text` as the tokenizer must see it: words of an adapter replaced by their tokens."""
        for word, tokens in self.spelling.items():
            text = re.sub(rf"\b{re.escape(word)}\b", tokens, text, flags=re.IGNORECASE)
        return text


def reference(name: str, *, folder: Path | None = None) -> BaseRef:
    """The pinned reference of a base: the digests of its files, without loading it.

    Raises:
        UnknownBase: no such name, or its files are not where they should be.
        IntegrityError: a shipped file is not what was shipped.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise UnknownBase(f"no base is called {name!r}; there are {', '.join(sorted(CATALOGUE))}")
    where = folder or entry.folder
    if where is None:
        raise UnknownBase(f"base {name!r} does not ship with Likeness: set base.folder to a local copy in diffusers layout (safetensors)")
    if not (where / "model_index.json").is_file():
        raise UnknownBase(f"base {name!r} has no model_index.json in its folder: a diffusers pipeline saved with safetensors is needed there")
    files = {p.relative_to(where).as_posix(): _sha256(p) for p in sorted(where.rglob("*")) if p.is_file() and p.suffix in READ and p.name != "manifest.json"}
    if not any(f.endswith(".safetensors") for f in files):
        raise UnknownBase(f"base {name!r} holds no safetensors: pickled weights are never read; convert it with save_pretrained(safe_serialization=True)")
    manifest = where / "manifest.json"
    if manifest.is_file():
        expected = json.loads(manifest.read_text())
        wrong = sorted(f for f in expected.keys() | files.keys() if expected.get(f) != files.get(f))
        if wrong:
            raise IntegrityError(f"base {name!r}: {', '.join(wrong[:3])} is not what was shipped: install Likeness again")
    scheduler = json.loads((where / "scheduler" / "scheduler_config.json").read_text())
    return BaseRef(name=name, family=entry.family, resolution_px=entry.resolution_px, prediction=scheduler.get("prediction_type", "epsilon"),
                   licence=entry.licence, revision=hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:40], files=files)


def load(name: str, *, folder: Path | None = None, device: str | None = None) -> Base:
    """Load a base and freeze it.

    Raises:
        UnknownBase, IntegrityError: see `reference`.
    """
    ref = reference(name, folder=folder)
    entry = CATALOGUE[name]
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if where == "cuda" else torch.float32      # bf16 on these CPUs was 13x slower than fp32
    diffusers_logging.disable_progress_bar()          # the bars of a run are ours
    transformers_logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(str(folder or entry.folder), dtype=dtype, local_files_only=True, use_safetensors=True,
                                                   safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(where)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return Base(ref, pipe, entry.trigger, entry.guidance, torch.device(where), dtype)


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the sha256 of every file that a base is made of."""
    files = {p.relative_to(folder).as_posix(): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in READ and p.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(files, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
