"""LoRA (arXiv 2106.09685): low-rank factors in the UNet and, if asked, in the text towers. The arithmetic is peft's.

T-LoRA (arXiv 2507.05964), if asked: how many ranks of the UNet's factors act depends on the timestep. What is noisy decides pose and place, which a subject's few photos
should not teach; what is nearly clean decides the face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from likeness.errors import BadCheckpoint
from likeness.recipe import Lora, LowRank
from models.diffusion.bases import Base
from models.diffusion.batches import Batches, TrainingInputs
from models.diffusion.loop import Group

UNET = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "convolution": ("conv1", "conv2"),
}
TEXT_TOWER = ("q_proj", "k_proj", "v_proj", "out_proj")
NAME = "subject"                 # of the factors inside peft; never in a file


class Factors:
    """Factors in the networks of a base, until `close`. With B = 0, as they begin, outputs are unchanged to the bit."""

    def __init__(self, base: Base, plan: LowRank | Mapping[str, int], *, seed: int) -> None:
        """`plan`: a recipe, or for each layer by name ("unet.a.b") its rank, at scale 1."""
        configs = _of_recipe(base, plan) if isinstance(plan, LowRank) else _of_layers(plan)
        self._networks: dict[str, Any] = {part: getattr(base.pipe, part) for part in configs}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part, network in self._networks.items():
                inject_adapter_in_model(configs[part], network, NAME)
        self._on = True
        fewest = plan.min_rank if isinstance(plan, LowRank) else None
        self._mask = None if fewest is None else RankMask(base, fewest, lambda: self._on)
        self.parameters = [p for network in self._networks.values() for n, p in network.named_parameters() if f".{NAME}." in n]
        for p in self.parameters:
            p.data = p.data.float()
            p.requires_grad_(True)

    def enable(self, on: bool) -> None:
        """Let the factors act and learn, or leave the base as it is without them."""
        self._on = on
        for network in self._networks.values():
            for module in network.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(on)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The base without the factors, for a while."""
        self.enable(False)
        try:
            yield
        finally:
            self.enable(True)

    def state(self) -> dict[str, Tensor]:
        """The factors by name, as fp32 CPU tensors: the network's name, then peft's name without the adapter's own."""
        return {k: v.detach().float().cpu().contiguous().clone() for k, v in sorted(self._tensors().items())}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved factors in.

        Raises:
            BadCheckpoint: if the names or shapes are not those of these factors.
        """
        must_fit(self._tensors(), tensors)
        for part, network in self._networks.items():
            own = {k.removeprefix(f"{part}."): v.float() for k, v in tensors.items() if k.startswith(f"{part}.")}
            set_peft_model_state_dict(network, own, adapter_name=NAME)

    def close(self) -> None:
        """Take the factors out: every layer is the base's own object again."""
        if self._mask is not None:
            self._mask.close()
        for network in self._networks.values():
            for place, module in list(network.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    parent, _, child = place.rpartition(".")
                    setattr(network.get_submodule(parent), child, module.get_base_layer())
            del network.peft_config
            network.requires_grad_(False)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{part}.{k}": v for part, network in self._networks.items() for k, v in get_peft_model_state_dict(network, adapter_name=NAME).items()}


def ranks_at(t_B: Tensor, *, rank: int, fewest: int, timesteps: int) -> Tensor:
    """How many ranks act at timesteps (B,): fewest + floor((rank - fewest) * (T - t) / T), long; as get_mask_by_timestep of ControlGenAI/T-LoRA at exponent 1."""
    return fewest + (rank - fewest) * (timesteps - t_B.long()) // timesteps


class RankMask:
    """Between A and B of every factor of the UNet: the first ranks pass, the others are zero, as the timestep says that the UNet is called with.

    Whoever calls the UNet, a step of training or a pipeline's sampler, tells it the timestep; so both are masked here and nowhere else. The last call counts until
    the next one, so that activations which are computed a second time in the backward pass have the mask of the first. A call in which the factors do not act is none.
    """

    def __init__(self, base: Base, fewest: int, acting: Callable[[], bool]) -> None:
        self._fewest, self._acting = fewest, acting
        self._timesteps = int(base.pipe.scheduler.config.num_train_timesteps)
        self._t_B = torch.zeros(1, dtype=torch.long)
        layers = [module for module in base.unet.modules() if isinstance(module, BaseTunerLayer)]
        self._handles = [base.unet.register_forward_pre_hook(self._note, with_kwargs=True), *(layer.lora_A[NAME].register_forward_hook(self._cut) for layer in layers)]

    def _note(self, unet: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._acting():
            t = given[1] if len(given) > 1 else named["timestep"]
            self._t_B = torch.as_tensor(t, device=given[0].device if given else None).reshape(-1)

    def _cut(self, factor: Any, given: Any, inner: Tensor) -> Tensor:
        """(B, ..., r) of a linear A or (B, r, H, W) of a convolution, with zeros from rank r(t) on."""
        axis = 1 if isinstance(factor, nn.Conv2d) else inner.dim() - 1
        rank = inner.shape[axis]
        acts = ranks_at(self._t_B.to(inner.device), rank=rank, fewest=self._fewest, timesteps=self._timesteps)
        keep_Br = torch.arange(rank, device=inner.device) < acts[:, None]
        return inner * keep_Br.reshape(len(acts), *(rank if d == axis else 1 for d in range(1, inner.dim()))).to(inner.dtype)

    def close(self) -> None:
        """Nothing is masked any more."""
        for handle in self._handles:
            handle.remove()


def _of_recipe(base: Base, recipe: LowRank) -> dict[str, LoraConfig]:
    targets = {"unet": [m for t in recipe.targets if t in UNET for m in UNET[t]]}
    if "text_encoder" in recipe.targets:
        targets |= {tower: list(TEXT_TOWER) for tower in base.towers}
    return {part: LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, init_lora_weights=True, target_modules=names) for part, names in targets.items()}


def _of_layers(ranks: Mapping[str, int]) -> dict[str, LoraConfig]:
    parts: dict[str, dict[str, int]] = {}
    for layer, rank in ranks.items():
        part, _, place = layer.partition(".")
        parts.setdefault(part, {})[place] = rank
    return {part: LoraConfig(r=1, lora_alpha=1, init_lora_weights=True, target_modules=list(own), rank_pattern=own, alpha_pattern=own) for part, own in parts.items()}


def must_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse saved tensors that are not those of this recipe.

    Raises:
        BadCheckpoint: naming the first that differs.
    """
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(k for k in own if own[k].shape != tensors[k].shape)
    if wrong:
        raise BadCheckpoint(f"these weights do not fit the recipe: {wrong[0]} and {len(wrong) - 1} more differ; train again or name the recipe they came from")


class LoraStep:
    """A `loop.Step`: factors alone."""

    def __init__(self, base: Base, inputs: TrainingInputs, recipe: Lora) -> None:
        self._ids_KWT = base.token_ids(inputs.texts) if "text_encoder" in recipe.targets else None
        self._base = base
        self._factors = Factors(base, recipe, seed=recipe.seed)
        self._batches = Batches(base, inputs, recipe.objective, batch=recipe.batch, seed=recipe.seed, alone=self._factors.alone)

    def groups(self) -> list[Group]:
        return [Group(self._factors.parameters)]

    def pictures(self, step: int) -> int:
        return self._batches.pictures

    def loss(self, step: int, *, piece: int = 0, of: int = 1) -> Tensor:
        batch = self._batches.draw(step, piece=piece, of=of)
        return self._batches.loss(batch, self._batches.encoded(batch) if self._ids_KWT is None else self._base.read_texts(self._ids_KWT[batch.texts_B]))

    def state(self) -> dict[str, Tensor]:
        return self._factors.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._factors.restore(tensors)

    def export(self) -> dict[str, Tensor]:
        return self._factors.state()

    def close(self) -> None:
        self._factors.close()
