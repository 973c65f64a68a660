"""Bases: pretrained text-to-image pipelines, pinned, loaded once and kept resident.

A base comes from the package (the maquette) or from a local folder in diffusers layout, which `models.diffusion.hub` may have filled. Only safetensors are read, remote code never
runs, and every file's sha256 becomes part of the BaseRef, so a changed weight is a changed base. What sets one family apart from another
is in `models.diffusion.families`; whoever trains or samples asks the Base and need not know.

Shapes: B texts or pictures, W text towers, T tokens, D width of the states, E width of the pooled vector, H and W latent sides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from likeness.errors import IntegrityError, UnknownBase
from likeness.records import BaseRef
from likeness.settings import GUIDANCE
from models.diffusion.families import FAMILIES, Family, Texts

MAQUETTE = Path(__file__).parents[1] / "maquette"
READ = {".safetensors", ".json", ".txt"}      # what a base is made of; anything else in its folder is ignored


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    family: Literal["sd15", "sdxl"]
    resolution_px: int
    prediction: Literal["epsilon", "v_prediction"]                          # what its network returns, where its scheduler's file does not say
    licence: str
    trigger: str                             # a word that is one token and means nothing to this base
    guidance: float
    folder: Path | None = None               # None: the user must say where it lies
    hub: tuple[str, str] | None = None       # (repository, commit) that this entry means
    framings: tuple[Literal["tight", "wide"], ...] = ("tight", "wide")      # of the portraits it is trained on


CATALOGUE: Mapping[str, Entry] = {
    "maquette": Entry("sd15", 128, "v_prediction", "Apache-2.0; trained on CC0 renders, no real person", "zqaa", GUIDANCE["maquette"], MAQUETTE / "weights", framings=("tight",)),
    "sd15": Entry("sd15", 512, "epsilon", "CreativeML Open RAIL-M", "sks", GUIDANCE["sd15"],
                  hub=("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14")),
    "sdxl": Entry("sdxl", 1024, "epsilon", "CreativeML Open RAIL++-M", "sks", GUIDANCE["sdxl"],
                  hub=("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b")),
}


@dataclass
class Base:
    """A resident pipeline: frozen modules in fp32 on CPU, bf16 on GPU, with what training and sampling need to know of it."""

    ref: BaseRef
    pipe: Any                                # of the class that its family names
    trigger: str
    guidance: float
    device: torch.device
    dtype: torch.dtype
    spelling: dict[str, str] = field(default_factory=dict)       # words that stand for other tokens while an adapter with words is in place

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def family(self) -> Family:
        return FAMILIES[self.ref.family]

    @property
    def towers(self) -> dict[str, Any]:
        """The text towers by their names in the pipeline, in the order of their states."""
        return {f"text_encoder{end}": getattr(self.pipe, f"text_encoder{end}") for end in self.family.ends}

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
    def encode_texts(self, texts: list[str]) -> Texts:
        """Prompts -> what the network reads of them, fp32, on CPU."""
        return Texts.cat([self.read_texts(ids) for ids in self.token_ids(texts).split(64)]).to(torch.device("cpu"), torch.float32)

    def token_ids(self, texts: list[str]) -> Tensor:
        """Prompts -> token numbers (B, W, T) of each tower's tokenizer, on CPU. Longer prompts than T tokens are cut, as the pipeline does."""
        spelt = [self.spell(t) for t in texts]
        words = [getattr(self.pipe, f"tokenizer{end}") for end in self.family.ends]
        return torch.stack([w(spelt, padding="max_length", truncation=True, max_length=w.model_max_length, return_tensors="pt").input_ids for w in words], dim=1)

    def read_texts(self, ids_BWT: Tensor) -> Texts:
        """Token numbers -> what the network reads of them, on the device, with whatever gradient the towers have.

        Where the pipeline puts zeros in the place of an empty prompt, the empty text is zeros here too: guidance starts from what was trained.
        """
        texts = self.family.read(list(self.towers.values()), ids_BWT.to(self.device))
        if not self.pipe.config.get("force_zeros_for_empty_prompt", False):
            return texts
        return texts.zeroed(ids_BWT[:, 0, 1] == self.pipe.tokenizer.eos_token_id)

    def denoise(self, noisy_BCHW: Tensor, t_B: Tensor, texts: Texts, *, original_px_B: Tensor | None = None) -> Tensor:
        """What the network returns (B, C, H, W) for noisy latents at timesteps under texts.

        Args:
            original_px_B: sides of the pictures before they were brought to the base's resolution, for a base that was told so in its training;
                None is the base's own resolution.
        """
        conditions = self.family.conditions(texts, original_px_B, self.ref.resolution_px)
        made: Tensor = self.unet(noisy_BCHW, t_B, texts.states_BTD, added_cond_kwargs=conditions).sample
        return made

    @contextmanager
    def resting(self, parts: Iterable[str]) -> Iterator[None]:
        """These parts of the pipeline in the host's memory meanwhile, which leaves theirs on the device to a training that does not read them. On a CPU nothing moves."""
        away = [getattr(self.pipe, part) for part in parts] if self.device.type != "cpu" else []
        try:
            for module in away:
                module.to("cpu")
            yield
        finally:
            for module in away:
                module.to(self.device)

    def recompute(self, on: bool) -> None:
        """Gradient checkpointing of the UNet: its blocks' activations are computed again in the backward pass instead of being kept."""
        if on:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

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
        raise UnknownBase(f"base {name!r} does not ship with Likeness: set base_folder to a local copy in diffusers layout (safetensors)")
    if not (where / "model_index.json").is_file():
        raise UnknownBase(f"base {name!r} has no model_index.json in its folder: a diffusers pipeline saved with safetensors is needed there")
    files = {p.relative_to(where).as_posix(): _sha256(p) for p in sorted(where.rglob("*")) if p.is_file() and p.suffix in READ and p.name != "manifest.json"}
    for part in ("unet", "vae", *(f"text_encoder{end}" for end in FAMILIES[entry.family].ends)):
        if not any(f.startswith(f"{part}/") and f.endswith(".safetensors") for f in files):
            raise UnknownBase(f"base {name!r} holds no safetensors in {part}/: pickled weights are never read; convert it with save_pretrained(safe_serialization=True)")
    manifest = where / "manifest.json"
    if manifest.is_file():
        expected = json.loads(manifest.read_text())
        wrong = sorted(f for f in expected.keys() | files.keys() if expected.get(f) != files.get(f))
        if wrong:
            raise IntegrityError(f"base {name!r}: {', '.join(wrong[:3])} is not what was shipped: install Likeness again")
    return BaseRef(name=name, family=entry.family, resolution_px=entry.resolution_px, prediction=_prediction(name, entry, where), licence=entry.licence,
                   revision=hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:40], files=files)


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
    family = FAMILIES[entry.family]
    pipe = family.pipeline.from_pretrained(str(folder or entry.folder), dtype=dtype, local_files_only=True, use_safetensors=True, **family.options)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(where)
    base = Base(ref, pipe, entry.trigger, entry.guidance, torch.device(where), dtype)
    for module in (pipe.unet, pipe.vae, *base.towers.values()):
        module.eval().requires_grad_(False)
    for end in family.ends:
        find_end_of_text(base.towers[f"text_encoder{end}"], getattr(pipe, f"tokenizer{end}"))
    return base


def find_end_of_text(tower: Any, tokenizer: Any) -> None:
    """Let a tower pool where the text ends, also where tokens were added whose numbers are higher.

    Configurations from before transformers #24773 name 2 as the end of a text, SDXL's among them; the highest number of the text is then taken for
    its end, which a new word's vectors would be.
    """
    text_model = getattr(tower, "text_model", tower)
    if text_model.eos_token_id == 2:
        text_model.eos_token_id = tokenizer.eos_token_id


def _prediction(name: str, entry: Entry, folder: Path) -> Literal["epsilon", "v_prediction"]:
    """What the network of this folder returns, after a look whether it is of the entry's family and resolution."""
    described = {part: _described(name, folder / part) for part in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")}
    wanted, found = FAMILIES[entry.family].pipeline.__name__, described["model_index.json"].get("_class_name")
    if found != wanted:
        raise UnknownBase(f"base {name!r} is a {wanted}, its folder holds a {found}: name the base that it is, or another folder")
    side_px = int(described["unet/config.json"].get("sample_size") or 0) * 2 ** (len(described["vae/config.json"].get("block_out_channels", ())) - 1)
    if side_px != entry.resolution_px:
        raise UnknownBase(f"base {name!r} draws {entry.resolution_px} px, its folder holds one of {side_px} px: name the base that it is, or another folder")
    prediction = described["scheduler/scheduler_config.json"].get("prediction_type", entry.prediction)
    if prediction not in ("epsilon", "v_prediction"):
        raise UnknownBase(f"base {name!r} predicts {prediction!r}; epsilon and v_prediction can be trained: use another folder")
    return "v_prediction" if prediction == "v_prediction" else "epsilon"


def _described(name: str, path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        held = None
    if not isinstance(held, dict):
        raise UnknownBase(f"base {name!r}: {path.parent.name}/{path.name} is missing or is not JSON: a whole pipeline in diffusers layout is needed there")
    return held


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the sha256 of every file that a base is made of."""
    files = {p.relative_to(folder).as_posix(): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in READ and p.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(files, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
