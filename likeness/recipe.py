"""Recipes: everything that decides a training, as one frozen discriminated union.

Two equal recipes have one digest; an impossible combination cannot be written; an unknown key is refused by name. This module grows by
one class per method; what a method *does* is in `models.diffusion`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, TypeAdapter

from likeness.records import Record


class Objective(Record):
    """What is minimised. Defaults are those of the maquette preset; each number's reason is beside it."""

    min_snr: float = Field(5.0, gt=0, le=1000, description="min-SNR gamma (arXiv 2303.09556); 1000 switches the weighting off")
    background_weight: float = Field(0.3, ge=0, le=1, description="weight of the loss outside the face mask: the person counts, the room less")
    prior_weight: float = Field(0.25, ge=0, le=10, description="weight of class images: keeps 'a woman' from becoming this woman")
    caption_dropout: float = Field(0.1, ge=0, le=0.5, description="share of empty captions: keeps guidance working after training")
    noise_offset: float = Field(0.0, ge=0, le=0.2, description="0: a zero-terminal-SNR base does not need it")


class Lora(Record):
    """DreamBooth with low-rank adapters (arXiv 2106.09685) on the UNet."""

    method: Literal["lora"] = "lora"
    base: str = Field("maquette", description="name in the catalogue of bases")
    steps: int = Field(200, ge=1, le=20_000)
    batch: int = Field(4, ge=1, le=64)
    learning_rate: float = Field(3e-3, gt=0, le=1.0, description="on two users AUC rose from 0.73 and 0.92 at 1.5e-3 to 0.86 and 0.96: docs/log.md, 2026-11-24")
    rank: int = Field(16, ge=1, le=256)
    alpha: float = Field(16.0, gt=0, le=1024, description="scale of the update is alpha / rank")
    targets: tuple[Literal["attention", "convolution"], ...] = Field(("attention", "convolution"), min_length=1,
                                                                     description="the maquette draws faces in its convolutions")
    max_grad_norm: float = Field(1.0, gt=0, le=100)
    checkpoint_every: int = Field(50, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    objective: Objective = Objective()


Recipe = Lora      # becomes Annotated[A | B, Field(discriminator="method")] with the second method
RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)
