"""T-LoRA: few ranks act on noise, all on what is nearly clean, in training and in sampling alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from likeness.errors import RecipeError
from likeness.recipe import RECIPE, Lora, Objective, Pivotal
from models.diffusion import bases, checkpoint
from models.diffusion.batches import TrainingInputs, encode
from models.diffusion.exports import lora_file
from models.diffusion.loop import Checkpoint, Job, fit
from models.diffusion.lora import NAME, Factors, ranks_at
from models.diffusion.methods import adapted, plan_of, step_of
from models.diffusion.sampler import sample
from tests.models.diffusion import tiny

MASKED = Lora(base="tiny-sd15", steps=4, batch=3, rank=4, alpha=4.0, min_rank=1, checkpoint_every=2, targets=("attention", "convolution", "text_encoder"))
PLAIN = MASKED.model_copy(update={"min_rank": None})
CLEAN, NOISY = 0, 999


@pytest.fixture(scope="module", params=get_args(tiny.Family))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bases.Base]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bases.CATALOGUE, "tiny-sd15", tiny.entry(request.param))  # type: ignore[arg-type]
        yield bases.load("tiny-sd15", folder=tiny.build(tmp_path_factory.mktemp("base"), request.param, prediction="epsilon"), device="cpu")


@pytest.fixture(scope="module")
def inputs(base: bases.Base) -> TrainingInputs:
    pictures = np.random.default_rng(0).integers(0, 256, (3, tiny.SIDE_PX, tiny.SIDE_PX, 3), np.uint8)
    return encode(base, crops_NSSC=pictures[:2], masks_NSS=np.full((2, tiny.SIDE_PX, tiny.SIDE_PX), 255, np.uint8), captions=["sks man", "a sks man"],
                  class_images_MSSC=pictures[2:], class_captions=["man"], noun="man")


@pytest.fixture
def factors(base: bases.Base) -> Iterator[Factors]:
    """Factors by chance, masked."""
    held = Factors(base, MASKED, seed=0)
    held.restore(by_chance(held.state()))
    yield held
    held.close()
    assert not base.unet._forward_pre_hooks


def by_chance(state: dict[str, Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {k: 0.3 * torch.randn(v.shape, generator=g) for k, v in state.items()}


def without(tensors: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The UNet's factors with zeros from rank `first` on."""
    cut = {k: v.clone() for k, v in tensors.items()}
    for k, v in cut.items():
        if k.startswith("unet.") and ".lora_A." in k:
            v[first:] = 0
    return cut


def seen(base: bases.Base, *timesteps: int) -> Tensor:
    """What the UNet returns for one noise at timesteps."""
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1)).repeat(len(timesteps), 1, 1, 1)
    with torch.no_grad():
        texts = base.read_texts(base.token_ids(["sks man"] * len(timesteps)))
        return base.denoise(noise, torch.tensor(timesteps), texts)


def test_ranks_fall_from_all_to_the_fewest() -> None:
    ranks = ranks_at(torch.arange(1000), rank=16, fewest=4, timesteps=1000)
    assert (ranks[0], ranks[1], ranks[500], ranks[999]) == (16, 15, 10, 4)
    assert (ranks.diff() <= 0).all()
    assert (ranks_at(torch.arange(1000), rank=4, fewest=4, timesteps=1000) == 4).all()


def test_each_picture_of_a_batch_has_the_ranks_of_its_timestep(base: bases.Base, factors: Factors) -> None:
    held = factors.state()
    mixed = seen(base, NOISY, CLEAN, 500)
    for row, (t, ranks) in enumerate(((NOISY, 1), (CLEAN, 4), (500, 2))):
        assert torch.allclose(seen(base, t)[0], mixed[row], atol=1e-5)
        factors.restore(without(held, ranks))
        assert torch.allclose(seen(base, t)[0], mixed[row], atol=1e-5)       # the others did nothing
        factors.restore(without(held, ranks - 1))
        assert (seen(base, t)[0] - mixed[row]).abs().max() > 1e-3           # and this one did
        factors.restore(held)
    with factors.alone():
        assert not torch.allclose(seen(base, NOISY)[0], mixed[0], atol=1e-3)


@pytest.mark.parametrize(("t", "ranks"), [(NOISY, 1), (500, 2), (CLEAN, 4)])
def test_ranks_that_do_not_act_have_no_gradient(base: bases.Base, factors: Factors, t: int, ranks: int) -> None:
    texts = base.read_texts(base.token_ids(["sks man"]))
    base.denoise(torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1)), torch.tensor([t]), texts).square().mean().backward()
    masked = [(m.lora_A[NAME].weight.grad, m.lora_B[NAME].weight.grad) for m in base.unet.modules() if hasattr(m, "lora_A")]
    assert len(masked) > 20
    for a, b in masked:
        assert not a[ranks:].any()
        assert not b[:, ranks:].any()
    assert all(any(a[rank].any() for a, _ in masked) for rank in range(ranks))
    of_texts = [p.grad for n, p in base.pipe.text_encoder.named_parameters() if "lora_A" in n and p.grad is not None]
    assert of_texts                                     # SDXL does not read the last layer
    assert all(g[rank].any() for g in of_texts for rank in range(4))      # texts have no timestep
    for p in factors.parameters:
        p.grad = None


@pytest.mark.parametrize("objective", [Objective(), Objective(prior="dop", prior_weight=1.0)], ids=["class pictures", "dop"])
def test_activations_that_are_computed_twice_are_masked_the_same(base: bases.Base, inputs: TrainingInputs, objective: Objective) -> None:
    recipe = MASKED.model_copy(update={"objective": objective})
    found = []
    for recompute in (False, True):
        step: Any = step_of(base, inputs, recipe)
        step.restore(by_chance(step.state()))
        base.recompute(recompute)
        step.loss(0).backward()
        found.append([torch.zeros(1) if p.grad is None else p.grad.clone() for p in step.groups()[0].parameters])
        base.recompute(False)
        step.close()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert any(g.any() for g in found[0])


@pytest.mark.parametrize("recipe", [MASKED, Pivotal(base="tiny-sd15", steps=4, batch=2, rank=3, min_rank=2, vectors=2, checkpoint_every=2, inversion_share=0.25)], ids=["lora", "pivotal"])
def test_a_training_resumes_to_the_bit_and_is_another_than_without(base: bases.Base, inputs: TrainingInputs, recipe: Any) -> None:
    def job(recipe: Any, **more: Any) -> Job:
        return Job("ada", lambda: step_of(base, inputs, recipe), plan_of(recipe), **more)

    kept: list[Checkpoint] = []
    [whole] = fit([job(recipe, on_checkpoint=kept.append)])
    assert whole.error is None, whole.error
    [resumed] = fit([job(recipe, resume=checkpoint.read(checkpoint.write(kept[0], training="k"), training="k"))])
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.tensors[k], v) for k, v in whole.tensors.items())
    [plain] = fit([job(recipe.model_copy(update={"min_rank": None}))])
    assert any(not torch.equal(plain.tensors[k], v) for k, v in whole.tensors.items())


def test_the_sampler_applies_the_mask_of_each_of_its_steps(base: bases.Base) -> None:
    factors = Factors(base, MASKED, seed=0)
    held = by_chance(factors.state())
    factors.close()
    base.pipe.scheduler.set_timesteps(1)
    [t] = base.pipe.scheduler.timesteps
    ranks = int(ranks_at(t[None], rank=4, fewest=1, timesteps=1000))
    assert 1 <= ranks < 4
    with adapted(base, held, MASKED):
        masked, twice = (sample(base, ["sks man"], [1], steps=steps) for steps in (1, 2))
    with adapted(base, without(held, ranks), PLAIN):
        assert np.array_equal(sample(base, ["sks man"], [1], steps=1), masked)
    with adapted(base, held, PLAIN):
        assert not np.array_equal(sample(base, ["sks man"], [1], steps=1), masked)
        assert not np.array_equal(sample(base, ["sks man"], [1], steps=2), twice)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_no_file_of_another_program_says_it(base: bases.Base, form: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot say that ranks depend on the timestep.*likeness sample.*recipe\.min_rank"):
        lora_file({}, MASKED, form, family=base.ref.family)


def test_a_recipe_without_it_is_the_recipe_that_it_was() -> None:
    assert "min_rank" not in Lora().plain()
    assert MASKED.plain()["min_rank"] == 1
    assert MASKED.digest != PLAIN.digest
    assert RECIPE.validate_python(MASKED.plain(), strict=False) == MASKED
    with pytest.raises(ValidationError, match="min_rank of at most rank, which is 16; 17 is more"):
        Lora(min_rank=17)
