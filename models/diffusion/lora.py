"""LoRA (arXiv 2106.09685): which layers get factors, and how factors leave and enter a pipeline. The arithmetic is peft's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from likeness.errors import BadCheckpoint
from likeness.recipe import Lora

TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "convolution": ("conv1", "conv2"),
}


def attach(unet: Any, recipe: Lora, *, name: str) -> list[nn.Parameter]:
    """Add trainable factors called `name`; returns them in a stable order. With B = 0 the network's outputs are unchanged, to the bit."""
    modules = [m for target in recipe.targets for m in TARGETS[target]]
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, init_lora_weights=True, target_modules=modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapter(name)
    factors = [p for n, p in unet.named_parameters() if f".{name}." in n]
    for p in factors:
        p.data = p.data.float()
        p.requires_grad_(True)
    return factors


def detach(unet: Any, *, name: str) -> None:
    """Remove the factors: the base is itself again."""
    unet.delete_adapters(name)


def state(unet: Any, *, name: str) -> dict[str, Tensor]:
    """The factors by name, as fp32 CPU tensors, in peft's naming without the adapter's own name."""
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in sorted(get_peft_model_state_dict(unet, adapter_name=name).items())}


def restore(unet: Any, tensors: dict[str, Tensor], *, name: str) -> None:
    """Put saved factors into an attached adapter.

    Raises:
        BadCheckpoint: if the names or shapes are not those of this adapter.
    """
    own = get_peft_model_state_dict(unet, adapter_name=name)
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(k for k in own if own[k].shape != tensors[k].shape)
    if wrong:
        raise BadCheckpoint(f"these weights do not fit the recipe: {wrong[0]} and {len(wrong) - 1} more differ; train again or name the recipe they came from")
    set_peft_model_state_dict(unet, tensors, adapter_name=name)


def as_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors as diffusers' own LoRA file has them: `unet.` before every key, fp16."""
    return {f"unet.{k}": v.half() for k, v in tensors.items()}


def from_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a diffusers LoRA file, fp32."""
    return {k.removeprefix("unet."): v.float() for k, v in tensors.items() if k.startswith("unet.")}
