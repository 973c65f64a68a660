"""Adapters for other programs: LoRA files of diffusers and of kohya / AUTOMATIC1111, embeddings of Textual Inversion, whole pipelines.

Names were checked against what diffusers' own loaders read (loaders/lora_conversion_utils.py, loaders/textual_inversion.py, 0.42.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from likeness.errors import RecipeError
from likeness.recipe import DreamBooth, LowRank, NewWords, Recipe
from models.diffusion.bases import Base
from models.diffusion.decoder import PREFIX
from models.diffusion.methods import adapted

FORMATS = ("diffusers", "kohya", "embedding", "vae")


def lora_file(tensors: Mapping[str, Tensor], recipe: Recipe, form: str, *, family: Literal["sd15", "sdxl"]) -> bytes:
    """The factors of an adapter as a LoRA file, fp16: for `pipe.load_lora_weights` (diffusers) or for kohya's scripts and web UIs (kohya).

    diffusers' files carry no alpha, so B is multiplied by alpha / rank there; kohya's carry it beside each layer.

    Raises:
        RecipeError: the method trains no factors, or its ranks depend on the timestep.
    """
    if not isinstance(recipe, LowRank):
        raise RecipeError(f"format {form!r} holds low-rank factors, a {recipe.method} adapter has none: {_fitting(recipe)}")
    if recipe.min_rank is not None:
        raise RecipeError(f"format {form!r} cannot say that ranks depend on the timestep, and with all of them at every timestep it would draw what nobody judged: draw with "
                          "`likeness sample`, or train without recipe.min_rank")
    factors = {k: v for k, v in tensors.items() if not k.startswith(("vectors", PREFIX))}
    if form == "kohya":
        return save({name: v.contiguous() for k, v in sorted(factors.items()) for name, v in _kohya(k, v, recipe.alpha, family)})
    scale = recipe.alpha / recipe.rank
    return save({with_text_model(k): (v.float() * scale if ".lora_B." in k else v.float()).half() for k, v in sorted(factors.items())})


def embedding_file(tensors: Mapping[str, Tensor], recipe: Recipe, *, token: str) -> bytes:
    """The vectors of an adapter for `pipe.load_textual_inversion`, which then knows them as `token`. Several vectors are one token there too.

    With two text towers the vectors of the first are called clip_l and those of the second clip_g, as files for SDXL have them, and the reader
    chooses the token.

    Raises:
        RecipeError: the method trains no vectors.
    """
    if not isinstance(recipe, NewWords):
        raise RecipeError(f"format 'embedding' holds the vectors of a word, a {recipe.method} adapter has none: {_fitting(recipe)}")
    vectors = [v.float() for k, v in sorted(tensors.items()) if k.startswith("vectors")]      # "vectors.WORD" comes before "vectors_2.WORD"
    return save({token: vectors[0]} if len(vectors) == 1 else dict(zip(("clip_l", "clip_g"), vectors, strict=True)))


def write_pipeline(base: Base, tensors: Mapping[str, Tensor], recipe: DreamBooth, folder: Path) -> None:
    """The base with the adapter's weights in it, as a folder in diffusers layout: every weight has changed, so no smaller file says it."""
    with adapted(base, tensors, recipe):
        base.pipe.save_pretrained(str(folder), safe_serialization=True)


def write_vae(base: Base, tensors: Mapping[str, Tensor], recipe: Recipe, folder: Path) -> None:
    """The base's VAE with the tuned decoder, as a folder for `AutoencoderKL.from_pretrained`: no LoRA or embedding file carries it.

    Raises:
        RecipeError: the recipe tunes no decoder.
    """
    if not recipe.decoder_steps:
        raise RecipeError("format 'vae' holds a tuned decoder, this adapter has none: the base's own VAE belongs to it")
    with adapted(base, tensors, recipe):
        base.pipe.vae.save_pretrained(str(folder), safe_serialization=True)


def _fitting(recipe: Recipe) -> str:
    fits = {"dreambooth": "diffusers (a whole pipeline)", "lora": "diffusers or kohya", "textual_inversion": "embedding",
            "pivotal": "diffusers or kohya, and embedding for its word"}[recipe.method]
    return f"choose {fits}"


def with_text_model(key: str) -> str:
    """The name that other programs expect: with `text_model`, which transformers 5 has no more."""
    return key.replace("text_encoder.", "text_encoder.text_model.", 1) if key.startswith("text_encoder.") else key


def kohya_layer(layer: str, family: Literal["sd15", "sdxl"], *, numbered: bool = True, attends: bool = True) -> str:
    """A layer's name in kohya's files: `unet.a.b` is `lora_unet_a_b`; of SDXL with blocks that are counted through, unless `numbered` is off.

    `attends`: whether the block of an upsampler has attention, as SDXL's have; the upsampler comes after it.
    """
    part, _, path = with_text_model(layer).partition(".")
    if family == "sdxl" and part == "unet" and numbered:
        path = _numbered_block(path, attends=attends)
    short = {"sd15": {"text_encoder": "te"}, "sdxl": {"text_encoder": "te1", "text_encoder_2": "te2"}}[family].get(part, part)
    return f"lora_{short}_{path.replace('.', '_')}"


def _kohya(key: str, value: Tensor, alpha: float, family: Literal["sd15", "sdxl"]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of a factor: `unet.a.b.lora_A.weight` is `lora_unet_a_b.lora_down.weight`, and alpha lies beside it."""
    layer, factor, _ = key.rsplit(".", 2)
    name = kohya_layer(layer, family)
    if factor == "lora_A":
        return [(f"{name}.alpha", torch.tensor(alpha)), (f"{name}.lora_down.weight", value.half())]
    return [(f"{name}.lora_up.weight", value.half())]


def _numbered_block(path: str, *, attends: bool) -> str:
    """A layer of SDXL's UNet as kohya's scripts call it, who count blocks through where diffusers nests them: a level has two blocks and a resampling."""
    level = r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)"

    def numbered(found: re.Match[str]) -> str:
        down = found[1] == "down"
        return f"{'input' if down else 'output'}_blocks.{3 * int(found[2]) + int(found[4]) + down}.{int(found[3] == 'attentions')}"

    path = re.sub(level, numbered, path)
    path = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda found: f"input_blocks.{3 * int(found[1]) + 3}.0.op", path)
    path = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda found: f"output_blocks.{3 * int(found[1]) + 2}.{1 + attends}.conv", path)
    path = path.replace("mid_block.attentions.0", "middle_block.1").replace("mid_block.resnets.0", "middle_block.0").replace("mid_block.resnets.1", "middle_block.2")
    path = path.replace(".time_emb_proj", ".emb_layers.1").replace(".conv_shortcut", ".skip_connection")
    return path.replace(".conv1", ".in_layers.2").replace(".conv2", ".out_layers.3")
