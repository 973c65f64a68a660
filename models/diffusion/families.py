"""Families of pipelines: what sets Stable Diffusion 1.5 and XL apart, in one place.

SD 1.5 has one text tower, whose last states the UNet reads (arXiv 2112.10752). SDXL has two; the UNet reads the states before the last layer of
both, side by side, and is told the pooled vector of the second, the size that a picture had, where it was cut and how large it should be
(arXiv 2307.01952, section 2.2). Checked against diffusers' own pipelines, 0.42.1.

Shapes: B texts or pictures, W text towers, T tokens, D width of the states, E width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Encoded texts: the states that the UNet attends to and, where the family has them, pooled vectors."""

    states_BTD: Tensor
    pooled_BE: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states_BTD)

    def __getitem__(self, rows: Tensor | slice) -> Texts:
        """Some of the texts."""
        return Texts(self.states_BTD[rows], None if self.pooled_BE is None else self.pooled_BE[rows])

    def to(self, device: torch.device, dtype: torch.dtype) -> Texts:
        """The same on another device, in another precision."""
        return Texts(self.states_BTD.to(device, dtype), None if self.pooled_BE is None else self.pooled_BE.to(device, dtype))

    def zeroed(self, rows_B: Tensor) -> Texts:
        """The same with zeros in some rows (B, bool)."""
        keep = ~rows_B.to(self.states_BTD.device)
        return Texts(self.states_BTD * keep[:, None, None], None if self.pooled_BE is None else self.pooled_BE * keep[:, None])

    @staticmethod
    def cat(parts: Sequence[Texts]) -> Texts:
        """All texts of all parts, in order."""
        pooled = [part.pooled_BE for part in parts if part.pooled_BE is not None]
        return Texts(torch.cat([part.states_BTD for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class Family:
    """A class of pipelines.

    Attributes:
        pipeline: diffusers' class.
        ends: how the names of its text towers and tokenizers end, in the order of their states.
        read: towers and token numbers (B, W, T) -> what the UNet reads of the texts.
        conditions: texts, sides of the original pictures (B,) or None, side to draw -> what else the UNet is told, or None.
        options: what its `from_pretrained` needs besides.
    """

    pipeline: Any
    ends: tuple[str, ...]
    read: Callable[[Sequence[Any], Tensor], Texts]
    conditions: Callable[[Texts, Tensor | None, int], dict[str, Tensor] | None]
    options: Mapping[str, Any]


def _last_states(towers: Sequence[Any], ids_BWT: Tensor) -> Texts:
    [tower] = towers
    return Texts(tower(ids_BWT[:, 0])[0])


def _states_before_the_last(towers: Sequence[Any], ids_BWT: Tensor) -> Texts:
    read = [tower(ids_BT, output_hidden_states=True) for tower, ids_BT in zip(towers, ids_BWT.unbind(1), strict=True)]
    return Texts(torch.cat([r.hidden_states[-2] for r in read], dim=-1), read[-1].text_embeds)


def _nothing_else(texts: Texts, original_px_B: Tensor | None, side_px: int) -> None:
    return None


def _pooled_and_sizes(texts: Texts, original_px_B: Tensor | None, side_px: int) -> dict[str, Tensor]:
    """Pooled vectors (B, E) and time ids (B, 6), fp32: height and width of the original, top and left of the cut (none), height and width wanted."""
    assert texts.pooled_BE is not None
    ids_B6 = torch.tensor([side_px, side_px, 0, 0, side_px, side_px], dtype=torch.float32, device=texts.pooled_BE.device).repeat(len(texts), 1)
    if original_px_B is not None:
        ids_B6[:, :2] = original_px_B.to(ids_B6)[:, None]
    return {"text_embeds": texts.pooled_BE, "time_ids": ids_B6}


FAMILIES: Mapping[str, Family] = {
    "sd15": Family(StableDiffusionPipeline, ("",), _last_states, _nothing_else, {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}),
    "sdxl": Family(StableDiffusionXLPipeline, ("", "_2"), _states_before_the_last, _pooled_and_sizes, {"add_watermarker": False}),
}
