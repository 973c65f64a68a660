"""The loop and the LoRA step, on the real maquette: small numbers, exact comparisons."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from likeness.errors import BadCheckpoint, NonFiniteLoss
from likeness.recipe import Lora
from models.diffusion import bases, checkpoint, lora, objective
from models.diffusion.dreambooth_lora import DreamBoothLora, TrainingInputs, encode
from models.diffusion.loop import Checkpoint, Job, Plan, fit
from models.diffusion.sampler import adapted, sample

RECIPE = Lora(steps=6, batch=2, rank=2, targets=("attention",), checkpoint_every=3)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def base() -> bases.Base:
    torch.set_num_threads(1)
    return bases.load("maquette", device="cpu")


@pytest.fixture(scope="module")
def inputs(base: bases.Base) -> TrainingInputs:
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    masks = np.zeros((3, 128, 128), np.uint8)
    masks[:, 32:96, 40:88] = 255
    return encode(base, crops_NSSC=crops, masks_NSS=masks, captions=["a photo of zqaa man"] * 3, class_images_MSSC=crops[::-1].copy(),
                  class_captions=["a photo of a man"] * 3)


def job(base: bases.Base, inputs: TrainingInputs, recipe: Lora = RECIPE, **more: object) -> Job:
    plan = Plan(recipe.steps, recipe.learning_rate, recipe.max_grad_norm, checkpoint_every=recipe.checkpoint_every)
    return Job("ada", lambda: DreamBoothLora(base, inputs, recipe), plan, **more)  # type: ignore[arg-type]


def test_six_steps_are_three_and_three_to_the_bit_also_resumed_twice(base: bases.Base, inputs: TrainingInputs) -> None:
    kept: list[Checkpoint] = []
    [whole] = fit([job(base, inputs, on_checkpoint=kept.append)])
    assert whole.error is None
    data = checkpoint.write(kept[0], training="k")
    for _ in range(2):
        [resumed] = fit([job(base, inputs, resume=checkpoint.read(data, training="k"))])
        assert resumed.losses == whole.losses
        assert resumed.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(resumed.tensors[k], whole.tensors[k]) for k in whole.tensors)


def test_only_the_factors_change_and_the_base_is_itself_afterwards(base: bases.Base, inputs: TrainingInputs) -> None:
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    [result] = fit([job(base, inputs)])
    after = base.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in result.tensors)
    assert any(v.abs().max() > 0 for k, v in result.tensors.items() if k.endswith("lora_B.weight"))


def test_factors_with_b_zero_leave_the_output_bit_identical(base: bases.Base) -> None:
    x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([500]), base.encode_texts(["a man"])
    with torch.no_grad():
        plain = base.unet(x, t, text).sample
        lora.attach(base.unet, RECIPE, name="probe")
        try:
            assert torch.equal(base.unet(x, t, text).sample, plain)
        finally:
            lora.detach(base.unet, name="probe")


def test_a_picture_depends_on_its_seed_and_the_adapter(base: bases.Base, inputs: TrainingInputs) -> None:
    [result] = fit([job(base, inputs, RECIPE.model_copy(update={"learning_rate": 0.05}))])
    plain = sample(base, ["a man", "a man"], [1, 2], steps=2)
    with adapted(base, lora.from_file(lora.as_file(result.tensors)), RECIPE):
        changed = sample(base, ["a man"], [1], steps=2)
    again = sample(base, ["a man"], [1], steps=2)
    assert np.abs(plain[0].astype(int) - again[0]).max() <= 3      # a batch of another size sums in another order
    assert np.array_equal(again, sample(base, ["a man"], [1], steps=2))
    assert np.abs(plain[0].astype(int) - plain[1]).max() > 30
    assert np.abs(again[0].astype(int) - changed[0]).max() > 30


def test_a_loss_that_is_not_finite_ends_its_own_job_alone(base: bases.Base, inputs: TrainingInputs) -> None:
    broken = dataclasses.replace(inputs, latents_NCHW=torch.full_like(inputs.latents_NCHW, float("nan")))
    bad, good = fit([job(base, broken), job(base, inputs)])
    assert isinstance(bad.error, NonFiniteLoss)
    assert good.error is None
    assert good.steps == RECIPE.steps


@pytest.mark.parametrize("damage", [lambda d: d[:-5], lambda d: d[:200] + bytes([d[200] ^ 1]) + d[201:], lambda d: b"", lambda d: b"\x80\x04pickle" * 10],
                         ids=["truncated", "flipped", "empty", "pickle"])
def test_a_damaged_checkpoint_is_refused(damage: object) -> None:
    data = checkpoint.write(Checkpoint(3, {"a": torch.ones(4)}, {}, [(3, 0.5)]), training="k")
    assert callable(damage)
    with pytest.raises(BadCheckpoint):
        checkpoint.read(damage(data), training="k")
    with pytest.raises(BadCheckpoint):
        checkpoint.read(data, training="another")
    assert checkpoint.read(data, training="k").step == 3


def test_v_target_inverts_to_x0_and_snr_weights_are_bounded() -> None:
    x0, noise, a = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2), torch.tensor([0.0, 0.01, 0.3, 0.9, 0.9999])
    v, x_t = objective.target(x0, noise, a, "v_prediction"), objective.add_noise(x0, noise, a)
    b = a.view(-1, 1, 1, 1)
    assert torch.allclose(b.sqrt() * x_t - (1 - b).sqrt() * v, x0, atol=1e-5)
    weight = objective.snr_weight(a, "v_prediction", 5.0)
    assert torch.isfinite(weight).all()
    assert (weight >= 0.05).all()
    assert (weight <= 1.0).all()


def test_mask_weights_have_mean_one_and_prefer_the_face() -> None:
    mask = torch.zeros(1, 128, 128)
    mask[:, 40:80, 40:80] = 1
    weight = objective.mask_weight(mask, height=16, width=16, background=0.3)
    assert torch.allclose(weight.mean(), torch.tensor(1.0))
    assert torch.allclose(weight[0, 0, 7, 7] / weight[0, 0, 0, 0], torch.tensor(1 / 0.3))


def test_equal_weights_are_equal_bytes() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    header = {"training_set": "x", "recipe": "y", "base": "z"}
    files = {checkpoint.write_adapter(tensors, header) for _ in range(40)}
    assert len(files) == 1
    back, words = checkpoint.read_adapter(files.pop())
    assert words == header
    assert torch.equal(back["b"], tensors["b"])
