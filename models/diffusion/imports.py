"""Files of other programs: LoRA files of diffusers and kohya, embeddings of Textual Inversion, as tensors that a base of ours can carry.

Only safetensors are read. A layer is found by the names that `models.diffusion.exports` would give it, so what is written there is read here; each layer keeps its
own rank, and its alpha is multiplied into B. Names besides ours were checked against diffusers' own loaders (loaders/lora_conversion_utils.py, 0.42.1). What does
not fit is refused as a whole: a file that is half read draws something that nobody trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from likeness.errors import BadCheckpoint, InputError, RecipeError, translated
from models.diffusion.bases import Base
from models.diffusion.checkpoint import metadata
from models.diffusion.exports import kohya_layer, with_text_model
from models.diffusion.lora import Factors
from models.diffusion.textual_inversion import put_words

MOST_BYTES = 4 * 2**30          # a LoRA file of SDXL at rank 256 has 1.7 GB
MOST_VECTORS = 64               # of a word; the longest prompt has 75 tokens
EMBEDDINGS = {"emb_params", "clip_l", "clip_g"}         # names in AUTOMATIC1111's files; diffusers' have the token's
WHOLE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")          # what names begin with in the one file of a whole base
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lora_mid": "LoCon with a middle factor", "oft_": "OFT", "ia3": "IA3",
               ".diff_b$": "weights beside factors", ".diff$": "weights beside factors", "lora_B.bias": "biases"}             # $ is where a name ends
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}           # of the texts that a UNet attends to
_FACTOR = re.compile(r"^(?P<layer>.+?)(?:\.processor)?(?P<attn>\.to_(?:q|k|v|out)_lora|\.lora_linear_layer|\.lora)?\.(?P<factor>lora_A|lora_B|lora_down|lora_up|down|up)(?:\.default)?\.weight$")


@dataclass(frozen=True)
class Foreign:
    """What a file holds, by our names: factors with A and B at scale 1, or the vectors of a word, one set for each text tower."""

    factors: dict[str, Tensor]
    vectors: tuple[Tensor, ...] = ()

    @property
    def what(self) -> str:
        """In words."""
        if self.vectors:
            return f"an embedding of {len(self.vectors[0])} vectors"
        ranks = sorted({v.shape[0] for k, v in self.factors.items() if ".lora_A." in k})
        return f"a LoRA file, {len(self.factors) // 2} layers, rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}"


def read_foreign(file: Path, base: Base) -> Foreign:
    """A file of another program, checked against the layers of the base.

    Raises:
        InputError: it is not there, not safetensors, damaged, or holds numbers that are none.
        RecipeError: it is of a kind that is not read, or does not fit the base; says where.
    """
    tensors, notes = _read(file)
    kind = next((words for mark, words in OTHER_KINDS.items() if any(mark in f"{key}$" for key in tensors)), None)
    if kind is not None:
        raise RecipeError(f"{file.name!r} holds {kind}: LoRA files and embeddings are read; merge it into a base with the program that made it, or save it as plain LoRA")
    if set(tensors) <= EMBEDDINGS or (len(tensors) == 1 and next(iter(tensors.values())).dim() <= 2 and not _FACTOR.match(next(iter(tensors)))):
        return Foreign({}, _vectors(file.name, tensors, base))
    return Foreign(_factors(file.name, tensors, notes, base))


@contextmanager
def carrying(base: Base, *foreign: Foreign) -> Iterator[None]:
    """The base with what files hold in place, an embedding as the base's own trigger; afterwards it is itself again.

    Raises:
        RecipeError: two of them are of one kind.
    """
    if sum(bool(f.vectors) for f in foreign) > 1 or sum(bool(f.factors) for f in foreign) > 1:
        raise RecipeError("two files of one kind: one LoRA file and one embedding can be carried at once")
    with ExitStack() as stack:
        for held in foreign:
            if held.vectors:
                vectors = {f"vectors{end}.{base.trigger}": v for end, v in zip(base.family.ends, held.vectors, strict=True)}
                stack.callback(put_words(base, vectors, count=len(held.vectors[0])).close)
            if held.factors:
                factors = Factors(base, {k.removesuffix(".lora_A.weight"): len(v) for k, v in held.factors.items() if k.endswith(".lora_A.weight")}, seed=0)
                stack.callback(factors.close)
                factors.restore(held.factors)
        yield


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in fp32, and the strings of the header. A whole base is known first: it holds positions too, which are whole numbers."""
    with translated(f"reading {file.name!r}"):
        if not file.is_file():
            raise InputError(f"{file.name!r} is no file here: name a LoRA file or an embedding, as .safetensors")
        if (size := file.stat().st_size) > MOST_BYTES:
            raise InputError(f"{file.name!r} has {size / 2**30:.1f} GiB: a LoRA file or an embedding has at most {MOST_BYTES // 2**30}; is it a whole base?")
        with file.open("rb") as opened:
            begins = opened.read(9)              # a safetensors file begins with the length of its header, which may be any number, and the header with {
        if (begins.startswith((b"\x80", b"PK")) and begins[8:] != b"{") or file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
            raise InputError(f"{file.name!r} is pickled: such files run code when they are opened and are never read here; get it as .safetensors")
        data = file.read_bytes()
    try:
        notes, tensors = metadata(data), load(data)
    except (SafetensorError, BadCheckpoint, ValueError, AttributeError, KeyError, RecursionError) as e:
        raise InputError(f"{file.name!r} is not a whole safetensors file: get it again ({e})") from e
    if not tensors:
        raise InputError(f"{file.name!r} holds no tensors: get it again")
    if any(key.startswith(WHOLE) for key in tensors) and not any(_FACTOR.match(key) for key in tensors):
        raise RecipeError(f"{file.name!r} is a whole base, not something beside one: LoRA files and embeddings are read; name one of these")
    odd = next((k for k, v in sorted(tensors.items()) if not (v.is_floating_point() or _is_whole_alpha(k, v)) or not torch.isfinite(v.float()).all()), None)
    if odd is not None:
        raise InputError(f"{file.name!r}: {odd} holds values that are no numbers (NaN, infinite, or no fractions at all): the file is damaged or its training failed; get another")
    return {k: v.float() for k, v in tensors.items()}, notes


def _is_whole_alpha(key: str, tensor: Tensor) -> bool:
    """Whether this is an alpha without fractions, as some programs save it."""
    return key.endswith(".alpha") and not tensor.is_complex() and tensor.dtype != torch.bool


def _vectors(name: str, tensors: Mapping[str, Tensor], base: Base) -> tuple[Tensor, ...]:
    if len(tensors) > 1 and tensors.keys() != {"clip_l", "clip_g"}:
        raise RecipeError(f"{name!r} holds {' and '.join(sorted(tensors))}: an embedding has one tensor, or clip_l and clip_g; get it from the program that made it again")
    odd = next((k for k, v in sorted(tensors.items()) if v.dim() not in (1, 2)), None)
    if odd is not None:
        raise RecipeError(f"{name!r}: {odd} has {tensors[odd].dim()} axes, vectors of a word have 1 or 2, and factors come in pairs: this is no embedding and no LoRA file; "
                          "name one that is")
    held = [tensors["clip_l"], tensors["clip_g"]] if len(tensors) > 1 else list(tensors.values())
    vectors = [v[None] if v.dim() == 1 else v for v in held]
    widths = [tower.config.hidden_size for tower in base.towers.values()]
    if [v.shape[-1] for v in vectors] != widths:
        found = " and ".join(str(v.shape[-1]) for v in vectors)
        seems = "SDXL" if len(vectors) == 2 else WIDTHS.get(int(vectors[0].shape[-1]), "none that is known here")
        raise RecipeError(f"{name!r} holds vectors of width {found}, base {base.ref.name!r} has words of width {' and '.join(map(str, widths))}; the file seems to be for {seems}: "
                          "name the base that it was made for")
    if not 1 <= len(vectors[0]) <= MOST_VECTORS or any(len(v) != len(vectors[0]) for v in vectors):
        raise RecipeError(f"{name!r} holds {', '.join(str(len(v)) for v in vectors)} vectors: 1 to {MOST_VECTORS}, and as many for each text tower, can be one word")
    return tuple(v.contiguous() for v in vectors)


def _factors(name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str], base: Base) -> dict[str, Tensor]:
    layers = _layers(base)
    attending = {layer.partition(".attentions.")[0] for layer in layers if ".attentions." in layer}
    spelt = {foreign: layer for layer in layers for foreign in _names(layer, base.ref.family, attends=layer.partition(".upsamplers.")[0] in attending)}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        foreign, part = _taken_apart(key)
        layer = spelt.get(foreign)
        if part is None or layer is None:
            raise RecipeError(f"{name!r} has {key}, and base {base.ref.name!r} has no such layer; the file seems to be for {_seems_for(tensors)}: name the base that it was made for")
        if part in found.setdefault(layer, {}):
            raise RecipeError(f"{name!r} names layer {layer} twice: get it from the program that made it again")
        found[layer][part] = tensor
    alphas = _noted_alphas(name, notes)
    made: dict[str, Tensor] = {}
    for layer, held in found.items():
        if not {"A", "B"} <= held.keys():
            raise RecipeError(f"{name!r} has only {' and '.join(sorted(held))} of layer {layer}: both factors are needed; get the whole file")
        if not (rank := held["A"].shape[0] if held["A"].dim() else 0):
            raise RecipeError(f"{name!r}: A of layer {layer} has no rank, and a factor has one at least: the file is damaged; get another")
        if "alpha" in held and held["alpha"].numel() != 1:
            raise RecipeError(f"{name!r}: alpha of layer {layer} has {held['alpha'].numel()} values, and one is needed: save it again with the program that made it")
        alpha = float(held["alpha"]) if "alpha" in held else alphas(layer, rank)
        for factor, wanted in zip("AB", _shapes(layers[layer], rank), strict=True):
            tensor = held[factor]
            if tensor.numel() != torch.Size(wanted).numel() or [s for s in tensor.shape if s != 1] != [s for s in wanted if s != 1]:
                raise RecipeError(f"{name!r}: {factor} of layer {layer} has shape {'x'.join(map(str, tensor.shape)) or 'none'}, base {base.ref.name!r} wants {'x'.join(map(str, wanted))}; "
                                  f"the file seems to be for {_seems_for(tensors)}: name the base that it was made for")
            made[f"{layer}.lora_{factor}.weight"] = (tensor.reshape(wanted) * (alpha / rank if factor == "B" else 1.0)).contiguous()
    return made


def _layers(base: Base) -> dict[str, nn.Module]:
    """Every layer that can have factors, by its name below the pipeline."""
    return {f"{part}.{place}": module for part in ("unet", *base.towers) for place, module in getattr(base.pipe, part).named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)}


def _names(layer: str, family: Any, *, attends: bool) -> set[str]:
    """What a layer may be called: ours, diffusers', kohya's, and kohya's with diffusers' blocks. `attends`: whether its block has attention."""
    return {layer, with_text_model(layer), kohya_layer(layer, family, attends=attends), kohya_layer(layer, family, numbered=False)}


def _taken_apart(key: str) -> tuple[str, str | None]:
    """(name of the layer, "A", "B" or "alpha") of a tensor's name; None for the part of one that is no factor."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    match = _FACTOR.match(key)
    if match is None:
        return key, None
    layer = match["layer"]
    if (attn := match["attn"] or "").startswith(".to_"):
        layer += {".to_out_lora": ".to_out.0"}.get(attn, attn.removesuffix("_lora"))
    return layer, "A" if match["factor"] in ("lora_A", "lora_down", "down") else "B"


def _shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B beside a layer."""
    if isinstance(module, nn.Linear):
        return (rank, module.in_features), (module.out_features, rank)
    return (rank, module.in_channels, *module.kernel_size), (module.out_channels, rank, 1, 1)


def _noted_alphas(name: str, notes: Mapping[str, str]) -> Any:
    """(layer, rank) -> alpha where the file has no tensor of it: as diffusers notes it in the header, else the rank."""
    unread = f"{name!r} has notes of diffusers that cannot be read: save it again with the program that made it"
    try:
        noted = json.loads(notes.get("lora_adapter_metadata", "{}"))
        odd = next((key for key, value in noted.items() if value is True and key.rpartition(".")[2] in ("use_dora", "use_rslora")), None)
    except (ValueError, AttributeError, RecursionError) as e:
        raise RecipeError(unread) from e
    if odd is not None:
        raise RecipeError(f"{name!r} was trained with {odd.rpartition('.')[2]}, whose scale is another: merge it into a base with the program that made it")

    def alpha(layer: str, rank: int) -> float:
        part, _, place = layer.partition(".")
        pattern = noted.get(f"{part}.alpha_pattern")
        if not isinstance(pattern, dict | None):
            raise RecipeError(f"{unread} (alpha_pattern of {part} names no layers)")
        own = [value for key, value in (pattern or {}).items() if place == key or place.endswith(f".{key}")]
        value = own[0] if own else noted.get(f"{part}.lora_alpha")
        if not own and value is None:
            return float(rank)
        try:
            made = float(value)
        except (ValueError, TypeError, OverflowError):
            made = math.nan
        if not math.isfinite(made):
            raise RecipeError(f"{unread} (alpha of layer {layer} is no number)")
        return made

    return alpha


def _seems_for(tensors: Mapping[str, Tensor]) -> str:
    """What base a LoRA file is for, by its names and by the width of the texts that its UNet attends to."""
    if any(re.search(r"double_blocks|single_blocks|joint_blocks|transformer\.|single_transformer", key) for key in tensors):
        return "a transformer (Flux, SD 3 and the like)"
    apart = ((*_taken_apart(key), v) for key, v in tensors.items())
    widths = {int(v.shape[1]) for layer, part, v in apart if part == "A" and v.dim() > 1 and re.search(r"attn2[._]to_k$", layer)}
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) or "input_blocks" in key for key in tensors):
        widths.add(2048)
    return WIDTHS.get(widths.pop(), "none that is known here") if len(widths) == 1 else "none that is known here"
