"""The four methods: what trains each, and how what was trained is put back into a base.

An adapter's file holds up to three kinds of tensors: low-rank factors (`unet.*`, `text_encoder.*`, as diffusers' own LoRA files name them), vectors
of a word (`vectors.WORD`, K x D), and differences from the base's weights (`delta.unet.*`, `delta.text_encoder.*`). What belongs to the second text
tower of SDXL is called `text_encoder_2.*`, `vectors_2.WORD`, `delta.text_encoder_2.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from likeness.errors import BadCheckpoint
from likeness.recipe import DreamBooth, Lora, Pivotal, Recipe, TextualInversion
from models.diffusion.bases import Base
from models.diffusion.batches import TrainingInputs
from models.diffusion.dreambooth import DreamBoothStep, Weights, trained_parts
from models.diffusion.loop import Plan, Step
from models.diffusion.lora import Factors, LoraStep
from models.diffusion.pivotal import PivotalStep
from models.diffusion.textual_inversion import TextualInversionStep, put_words

STEPS: Mapping[str, Callable[[Base, TrainingInputs, Any], Step]] = {
    "dreambooth": DreamBoothStep, "lora": LoraStep, "textual_inversion": TextualInversionStep, "pivotal": PivotalStep,
}


def step_of(base: Base, inputs: TrainingInputs, recipe: Recipe) -> Step:
    """The recipe's step, its parameters in place in the base until it is closed."""
    return STEPS[recipe.method](base, inputs, recipe)


def plan_of(recipe: Recipe) -> Plan:
    """The recipe's numbers that belong to the loop."""
    return Plan(recipe.steps, recipe.learning_rate, recipe.max_grad_norm, checkpoint_every=recipe.checkpoint_every)


def as_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as an adapter's file has them: factors and differences in fp16, the few vectors in fp32.

    A difference of 1e-3 is held to 1e-6 in fp16, a weight of 0.1 only to 5e-5: that is why differences are written, not weights.
    """
    return {k: v if k.startswith("vectors") else v.half() for k, v in tensors.items()}


@contextmanager
def adapted(base: Base, tensors: Mapping[str, Tensor], recipe: Recipe) -> Iterator[None]:
    """The base with an adapter's tensors in place; afterwards the base is itself again.

    Raises:
        BadCheckpoint: the tensors are not those of this recipe on this base.
    """
    parts: dict[str, dict[str, Tensor]] = {"delta": {}, "vectors": {}, "factors": {}}
    for key, tensor in tensors.items():
        kind = next((kind for kind in ("delta", "vectors") if key.startswith(kind)), "factors")
        parts[kind][key.removeprefix("delta.")] = tensor
    wanted = {"dreambooth": {"delta"}, "lora": {"factors"}, "textual_inversion": {"vectors"}, "pivotal": {"factors", "vectors"}}[recipe.method]
    if {kind for kind, held in parts.items() if held} != wanted:
        raise BadCheckpoint(f"this adapter holds {', '.join(sorted(k for k, v in parts.items() if v)) or 'nothing'}, a {recipe.method} adapter is "
                            f"{' and '.join(sorted(wanted))}: name the recipe it came from")
    with ExitStack() as stack:
        if isinstance(recipe, DreamBooth):
            weights = Weights(base, trained_parts(base, recipe))
            stack.callback(weights.close)
            weights.shift(parts["delta"])
        if isinstance(recipe, TextualInversion | Pivotal):
            stack.callback(put_words(base, parts["vectors"], recipe).close)
        if isinstance(recipe, Lora | Pivotal):
            factors = Factors(base, recipe, seed=recipe.seed)
            stack.callback(factors.close)
            factors.restore(parts["factors"])
        yield
