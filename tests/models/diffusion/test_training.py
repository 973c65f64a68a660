"""The loop and the four methods, on the real maquette: small numbers, exact comparisons."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from likeness.errors import BadCheckpoint, NonFiniteLoss
from likeness.recipe import METHODS, DreamBooth, InversionObjective, Lora, Objective, Pivotal, Recipe, TextualInversion
from models.diffusion import bases, checkpoint, objective
from models.diffusion.batches import Batches, TrainingInputs, encode, without_trigger
from models.diffusion.decoder import PREFIX, DecoderStep, decoder_plan
from models.diffusion.families import Texts
from models.diffusion.loop import Checkpoint, Job, Plan, fit, learning_rate
from models.diffusion.lora import Factors
from models.diffusion.methods import STEPS, adapted, as_file, plan_of, step_of, train
from models.diffusion.sampler import sample
from models.maquette.companions import read_class_pictures

DROPPING = Objective(caption_dropout=0.1)
LORA = Lora(objective=DROPPING, steps=10, batch=2, rank=2, targets=("attention",), checkpoint_every=5)
RECIPES: dict[str, Recipe] = {
    "lora": LORA,
    "lora with text": LORA.model_copy(update={"targets": ("attention", "text_encoder")}),
    "dreambooth": DreamBooth(objective=DROPPING, steps=10, batch=2, checkpoint_every=5),
    "dreambooth with text": DreamBooth(objective=DROPPING, steps=10, batch=2, checkpoint_every=5, text_encoder=True),
    "textual inversion": TextualInversion(steps=10, batch=2, checkpoint_every=5),
    "pivotal, resumed while inverting": Pivotal(objective=DROPPING, steps=10, batch=2, rank=2, targets=("attention",), checkpoint_every=5, inversion_share=0.7),
    "pivotal, resumed while tuning": Pivotal(objective=DROPPING, steps=10, batch=2, rank=2, targets=("convolution", "text_encoder"), checkpoint_every=5, inversion_share=0.3),
}
every_method = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def base() -> bases.Base:
    torch.set_num_threads(1)
    return bases.load("maquette", device="cpu")


@pytest.fixture(scope="module")
def inputs(base: bases.Base) -> TrainingInputs:
    """Women under captions of men: there is something to learn for every method."""
    pictures, captions = read_class_pictures("woman", side_px=128)
    masks = np.zeros((3, 128, 128), np.uint8)
    masks[:, 32:96, 40:88] = 255
    return encode(base, crops_NSSC=pictures[:3], masks_NSS=masks, captions=["a photo of zqaa man", "zqaa man smiling", "a painting of zqaa man"],
                  class_images_MSSC=pictures[3:6], class_captions=captions[3:6], noun="man")


def job(base: bases.Base, inputs: TrainingInputs, recipe: Recipe = LORA, **more: object) -> Job:
    return Job("ada", lambda: step_of(base, inputs, recipe), plan_of(recipe), **more)  # type: ignore[arg-type]


def weights(base: bases.Base) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part in ("unet", "text_encoder", "vae") for k, v in getattr(base.pipe, part).state_dict().items()}


@functools.cache
def before() -> dict[str, torch.Tensor]:
    """The weights of a base that nobody has trained on."""
    return weights(bases.load("maquette", device="cpu"))


def is_itself(base: bases.Base) -> bool:
    after = weights(base)
    return (after.keys() == before().keys() and all(torch.equal(after[k], before()[k]) for k in after) and not base.spelling
            and len(base.pipe.tokenizer) == base.pipe.text_encoder.get_input_embeddings().num_embeddings
            and not any(p.requires_grad or p.grad is not None for part in ("unet", "text_encoder") for p in getattr(base.pipe, part).parameters()))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_recipe_has_a_method() -> None:
    assert set(STEPS) == set(METHODS) == {r.method for r in RECIPES.values()}


@every_method
def test_ten_steps_are_five_and_five_to_the_bit_also_resumed_twice(base: bases.Base, inputs: TrainingInputs, recipe: Recipe) -> None:
    kept: list[Checkpoint] = []
    [whole] = fit([job(base, inputs, recipe, on_checkpoint=kept.append)])
    assert whole.error is None
    data = checkpoint.write(kept[0], training="k")
    for _ in range(2):
        [resumed] = fit([job(base, inputs, recipe, resume=checkpoint.read(data, training="k"))])
        assert resumed.losses == whole.losses
        assert same(resumed.tensors, whole.tensors)
    assert is_itself(base)


@pytest.mark.parametrize(("recipe", "loss"), [
    (RECIPES["lora with text"], 0.08746374), (RECIPES["textual inversion"], 0.06910503),
    (DreamBooth(batch=2, objective=Objective(prior="dop", caption_dropout=0.0)), 0.09647737),
], ids=["lora with text", "textual inversion", "dreambooth with dop"])
def test_a_known_training_stays_what_it_is(base: bases.Base, inputs: TrainingInputs, recipe: Recipe, loss: float) -> None:
    # As stored before there was a second family of bases; processors differ in the last digits. A change here is a new epoch of the stage train.
    [result] = fit([job(base, inputs, recipe.model_copy(update={"steps": 2}))])
    assert result.losses == ((2, pytest.approx(loss, rel=2e-5)),)


@every_method
def test_a_checkpoint_of_another_method_ends_the_job_and_leaves_the_base(base: bases.Base, inputs: TrainingInputs, recipe: Recipe) -> None:
    kept: list[Checkpoint] = []
    other = TextualInversion(steps=2, batch=1, vectors=2, checkpoint_every=1)
    fit([job(base, inputs, other, on_checkpoint=kept.append)])
    [result] = fit([job(base, inputs, recipe, resume=kept[0])])
    assert isinstance(result.error, BadCheckpoint)
    assert is_itself(base)


@every_method
def test_only_what_is_trained_has_a_gradient(base: bases.Base, inputs: TrainingInputs, recipe: Recipe) -> None:
    step = step_of(base, inputs, recipe)
    try:
        trained = {id(p) for group in step.groups() for p in group.parameters}
        waiting = {id(p) for group in step.groups() if group.first_step > 0 for p in group.parameters}
        step.loss(0).backward()
        modules = (base.pipe.unet, base.pipe.text_encoder)
        moved = {id(p) for m in modules for p in m.parameters() if p.grad is not None} | {id(p) for g in step.groups() for p in g.parameters if p.grad is not None}
        assert moved == trained - waiting
    finally:
        step.close()
    assert is_itself(base)


@every_method
def test_what_is_written_is_what_was_learnt_and_it_lowers_the_loss(base: bases.Base, inputs: TrainingInputs, recipe: Recipe) -> None:
    judge = Batches(base, inputs, InversionObjective(), batch=6, seed=99)

    @torch.no_grad()
    def loss() -> float:
        ids = base.token_ids(inputs.texts)
        drawn = [judge.draw(i) for i in range(3)]
        return float(torch.stack([judge.loss(b, base.read_texts(ids[b.texts_B])) for b in drawn]).mean())

    untrained = loss()
    [result] = fit([job(base, inputs, recipe.model_copy(update={"steps": 16}))])
    assert result.error is None
    file = checkpoint.write_adapter(as_file(result.tensors), {"method": recipe.method})
    with adapted(base, checkpoint.read_adapter(file)[0], recipe):
        assert loss() < (0.995 if recipe.method == "textual_inversion" else 0.98) * untrained      # a thousand numbers, not millions
    assert is_itself(base)
    assert loss() == untrained


@pytest.mark.parametrize(("name", "prefixes", "suffixes"), [
    ("lora", {"unet"}, ("lora_A.weight", "lora_B.weight")), ("lora with text", {"unet", "text_encoder"}, ("lora_A.weight", "lora_B.weight")),
    ("dreambooth", {"delta.unet"}, (".weight", ".bias")), ("dreambooth with text", {"delta.unet", "delta.text_encoder"}, (".weight", ".bias")),
    ("textual inversion", {"vectors.zqaa"}, ("vectors.zqaa",)),
    ("pivotal, resumed while inverting", {"unet", "vectors.zqaa"}, ("lora_A.weight", "lora_B.weight", "vectors.zqaa")),
])
def test_an_adapter_holds_what_its_method_trains_and_nothing_else(base: bases.Base, inputs: TrainingInputs, name: str, prefixes: set[str],
                                                                   suffixes: tuple[str, ...]) -> None:
    step = step_of(base, inputs, RECIPES[name])
    step.close()
    [result] = fit([job(base, inputs, RECIPES[name].model_copy(update={"steps": 1}))])
    assert all(any(k == p or k.startswith(f"{p}.") for p in prefixes) for k in result.tensors)
    assert all(any(k == p or k.startswith(f"{p}.") for k in result.tensors) for p in prefixes)
    assert all(k.endswith(suffixes) for k in result.tensors)
    assert is_itself(base)


@pytest.mark.parametrize("name", ["lora", "textual inversion", "dreambooth", "pivotal, resumed while tuning"])
def test_an_adapter_of_another_method_is_refused_and_the_base_is_itself(base: bases.Base, name: str) -> None:
    foreign = {"lora": {"vectors.zqaa": torch.ones(4, 256)}, "textual inversion": {"vectors.zqaa": torch.ones(3, 256)},
               "dreambooth": {"delta.unet.conv_in.weight": torch.ones(1)}, "pivotal, resumed while tuning": {"vectors.zqaa": torch.ones(4, 256), "unet.x": torch.ones(1)}}
    with pytest.raises(BadCheckpoint, match="recipe"), adapted(base, foreign[name], RECIPES[name]):
        pass
    assert is_itself(base)


def test_a_new_word_takes_the_trigger_alone_and_keeps_near_the_vocabulary(base: bases.Base, inputs: TrainingInputs) -> None:
    recipe = TextualInversion(steps=10, batch=2, learning_rate=0.5)              # far too fast: vectors would run away
    [result] = fit([job(base, inputs, recipe)])
    median = base.pipe.text_encoder.get_input_embeddings().weight.float().norm(dim=1).median()
    norms = result.tensors["vectors.zqaa"].norm(dim=1)
    assert ((norms > 0.79 * median) & (norms < 1.21 * median)).all()
    texts = ["a photo of a man", "zqaab man", "zqaa man", "a ZQAA man"]
    plain = base.encode_texts(texts).states_BTD
    with adapted(base, result.tensors, recipe):
        other = base.encode_texts(texts).states_BTD
        assert (base.token_ids(["zqaa man"])[0, 0, :7] == torch.tensor([988, 990, 991, 992, 993, *base.pipe.tokenizer("man").input_ids[1:]])).all()
    changed = [(a - b).abs().max() > 0.1 for a, b in zip(plain, other, strict=True)]
    assert changed == [False, False, True, True]
    assert torch.equal(plain, base.encode_texts(texts).states_BTD)


def test_vectors_begin_as_the_class_noun(base: bases.Base, inputs: TrainingInputs) -> None:
    step = step_of(base, inputs, TextualInversion(vectors=3, norm_slack=0.9))
    man = base.pipe.tokenizer("man", add_special_tokens=False).input_ids
    row = base.pipe.text_encoder.get_input_embeddings().known.weight[man[0]]
    assert torch.equal(step.state()["raw"], row.repeat(3, 1))
    step.close()


def test_factors_of_pivotal_tuning_wait_for_the_pivot(base: bases.Base, inputs: TrainingInputs) -> None:
    recipe = Pivotal(steps=4, batch=1, rank=2, targets=("attention",), inversion_share=0.5, checkpoint_every=1)
    kept: list[Checkpoint] = []
    fit([job(base, inputs, recipe, on_checkpoint=kept.append)])
    zero = [all(not v.any() for k, v in c.tensors.items() if k.endswith("lora_B.weight")) for c in kept]
    assert (recipe.pivot, zero) == (2, [True, True, False])
    assert not torch.equal(kept[1].tensors["raw"], kept[2].tensors["raw"])       # the vectors go on learning


def test_class_pictures_are_drawn_only_where_they_teach(base: bases.Base, inputs: TrainingInputs) -> None:
    counts = {}
    for name, objective_ in {"with": Objective(), "without": Objective(prior_weight=0.0), "words": Objective().for_words()}.items():
        counts[name] = len(Batches(base, inputs, objective_, batch=4, seed=0).draw(0).noisy_BCHW)
    assert counts == {"with": 6, "without": 4, "words": 4}


def test_a_training_without_class_pictures_needs_none(base: bases.Base) -> None:
    none = encode(base, crops_NSSC=np.zeros((1, 128, 128, 3), np.uint8), masks_NSS=np.full((1, 128, 128), 255, np.uint8), captions=["zqaa man"],
                  class_images_MSSC=np.zeros((0, 128, 128, 3), np.uint8), class_captions=[], noun="man")
    [result] = fit([job(base, none, LORA.model_copy(update={"steps": 1, "objective": Objective(prior_weight=0.0)}))])
    assert result.error is None


DOP = Objective(prior="dop", caption_dropout=0.0)
PRESERVED: dict[str, Recipe] = {name: RECIPES[name].model_copy(update={"objective": DOP, "steps": 3, "checkpoint_every": 9}) for name in RECIPES if name != "textual inversion"}


@pytest.mark.parametrize("recipe", PRESERVED.values(), ids=PRESERVED)
def test_output_preservation_costs_nothing_until_something_was_learnt(base: bases.Base, inputs: TrainingInputs, recipe: Recipe) -> None:
    def losses(update: dict[str, float]) -> tuple[float, float]:
        """Of the first step that trains on it: as it begins, and after everything trained was moved."""
        assert isinstance(recipe.objective, Objective)
        step = step_of(base, inputs, recipe.model_copy(update={"objective": recipe.objective.model_copy(update=update)}))
        try:
            before = float(step.loss(2).detach())
            with torch.no_grad():
                for group in step.groups():
                    for number, p in enumerate(group.parameters):
                        p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            return before, float(step.loss(2).detach())
        finally:
            step.close()

    light, heavy = losses({"prior_weight": 0.25}), losses({"prior_weight": 10.0})
    assert light[0] == pytest.approx(heavy[0], rel=1e-4)         # what is trained is still the base: it is no distance from itself
    assert heavy[1] > 1.02 * light[1]
    assert is_itself(base)


def test_output_preservation_trains_without_class_pictures_and_resumes(base: bases.Base, inputs: TrainingInputs) -> None:
    none = dataclasses.replace(inputs, class_images_MSSC=inputs.class_images_MSSC[:0], class_latents_MCHW=inputs.class_latents_MCHW[:0], class_captions=(),
                               encoded=Texts.cat([inputs.encoded[:3], inputs.encoded[6:]]))
    recipe = LORA.model_copy(update={"objective": Objective(prior="dop"), "steps": 4, "checkpoint_every": 2})
    kept: list[Checkpoint] = []
    [whole] = fit([job(base, none, recipe, on_checkpoint=kept.append)])
    [resumed] = fit([job(base, none, recipe, resume=kept[0])])
    assert whole.error is None
    assert same(resumed.tensors, whole.tensors)


@pytest.mark.parametrize(("caption", "plain"), [("a photo of a zqaa man", "a photo of a man"), ("zqaa man, smiling", "man, smiling"), ("ZQAA  man", "man"),
                                                ("zqaa in a park", "man in a park"), ("zqaa manor", "man manor"), ("a zqaab", "a zqaab")])
def test_a_caption_without_its_trigger(caption: str, plain: str) -> None:
    assert without_trigger(caption, trigger="zqaa", noun="man") == plain


@pytest.mark.parametrize("recipe", [*RECIPES.values(), PRESERVED["dreambooth"]], ids=[*RECIPES, "dreambooth with dop"])
def test_a_base_in_half_precision_is_trained_in_full(inputs: TrainingInputs, recipe: Recipe) -> None:
    half = bases.load("maquette", device="cpu")
    half.pipe.to(torch.bfloat16)
    half.dtype = torch.bfloat16
    [result] = fit([job(half, inputs, recipe.model_copy(update={"steps": 1, "batch": 1}))])
    assert result.error is None, result.error
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in result.tensors.values())
    with adapted(half, as_file(result.tensors), recipe):
        assert half.unet.dtype == torch.bfloat16
        sample(half, ["zqaa man"], [0], steps=1)


def reconstruction_error(base: bases.Base, inputs: TrainingInputs) -> float:
    real = inputs.images_NSSC.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        made = base.pipe.vae.decode(inputs.latents_NCHW / base.pipe.vae.config.scaling_factor).sample
    return float((inputs.masks_NSS[:, None] * (made - real).abs()).mean())


@pytest.mark.parametrize("name", ["lora", "dreambooth", "textual inversion"])
def test_a_tuned_decoder_draws_the_faces_better_and_leaves_with_its_adapter(base: bases.Base, inputs: TrainingInputs, name: str) -> None:
    recipe = RECIPES[name].model_copy(update={"steps": 2, "decoder_steps": 30})
    told: list[int] = []
    untuned = reconstruction_error(base, inputs)
    result = train("ada", base, inputs, recipe, on_report=lambda step, loss: told.append(step))
    assert result.error is None
    assert (result.steps, [s for s, _ in result.losses], told) == (2, [2], [2, 12, 22, 32])       # the curve is the method's, the bar counts through
    assert is_itself(base)
    again = train("ada", base, inputs, recipe)
    assert same(again.tensors, result.tensors)
    with adapted(base, as_file(result.tensors), recipe):
        assert reconstruction_error(base, inputs) < 0.98 * untuned
    assert is_itself(base)
    assert reconstruction_error(base, inputs) == untuned
    without = {k: v for k, v in result.tensors.items() if not k.startswith(PREFIX)}
    assert 0 < len(without) < len(result.tensors)
    with pytest.raises(BadCheckpoint, match="decoder"), adapted(base, without, recipe):
        pass


def test_a_training_that_failed_tunes_no_decoder(base: bases.Base, inputs: TrainingInputs) -> None:
    broken = dataclasses.replace(inputs, latents_NCHW=torch.full_like(inputs.latents_NCHW, float("nan")))
    told: list[int] = []
    result = train("ada", base, broken, LORA.model_copy(update={"decoder_steps": 10}), on_report=lambda step, loss: told.append(step))
    assert isinstance(result.error, NonFiniteLoss)
    assert (told, result.tensors) == ([], {})
    assert is_itself(base)


def test_what_memory_forced_on_the_decoder_is_counted_after_the_methods_steps(base: bases.Base, inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DecoderStep.loss

    def tight(self: DecoderStep, step: int, *, piece: int = 0, of: int = 1) -> torch.Tensor:
        if of == 1:
            raise torch.OutOfMemoryError
        return honest(self, step, piece=piece, of=of)

    monkeypatch.setattr(DecoderStep, "loss", tight)
    result = train("ada", base, inputs, LORA.model_copy(update={"steps": 2, "decoder_steps": 1}))
    assert result.error is None
    assert [(plan.from_step, plan.pieces) for plan in result.device] == [(2, 2)]
    assert is_itself(base)


def test_the_decoder_learns_class_pictures_too_where_there_are_some(base: bases.Base, inputs: TrainingInputs) -> None:
    none = dataclasses.replace(inputs, class_images_MSSC=inputs.class_images_MSSC[:0], class_latents_MCHW=inputs.class_latents_MCHW[:0], class_captions=())
    recipe = LORA.model_copy(update={"decoder_steps": 1, "objective": Objective(prior_weight=0.0)})          # whatever the method is trained on
    results = [fit([Job("ada", lambda i=i: DecoderStep(base, i, recipe), decoder_plan(recipe))])[0] for i in (inputs, none)]
    assert [r.error for r in results] == [None, None]
    assert not same(results[0].tensors, results[1].tensors)
    step = DecoderStep(base, inputs, recipe)
    pieces = [float(step.loss(0, piece=i, of=3).detach()) for i in range(step.pictures(0))]
    assert sum(pieces) == pytest.approx(float(step.loss(0).detach()), rel=1e-5)
    step.close()
    assert all(k.startswith(PREFIX) for r in results for k in r.tensors)
    assert is_itself(base)


def test_the_rate_of_a_group_warms_up_where_it_begins() -> None:
    plan = Plan(steps=100, learning_rate=1.0, max_grad_norm=1.0)
    assert learning_rate(40, plan, first_step=40) == pytest.approx(0.1)
    assert learning_rate(49, plan, first_step=40) > 0.9
    assert learning_rate(99, plan, first_step=40) < 0.11


def test_factors_with_b_zero_leave_the_output_bit_identical(base: bases.Base) -> None:
    x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([500]), base.encode_texts(["a man"]).states_BTD
    with torch.no_grad():
        plain = base.unet(x, t, text).sample
        factors = Factors(base, RECIPES["lora with text"], seed=0)  # type: ignore[arg-type]
        try:
            assert torch.equal(base.unet(x, t, text).sample, plain)
            assert torch.equal(base.encode_texts(["a man"]).states_BTD, text)
        finally:
            factors.close()


def test_a_picture_depends_on_its_seed_and_the_adapter(base: bases.Base, inputs: TrainingInputs) -> None:
    [result] = fit([job(base, inputs, LORA.model_copy(update={"learning_rate": 0.05}))])
    plain = sample(base, ["a man", "a man"], [1, 2], steps=2)
    with adapted(base, as_file(result.tensors), LORA):
        changed = sample(base, ["a man"], [1], steps=2)
    again = sample(base, ["a man"], [1], steps=2)
    assert np.abs(plain[0].astype(int) - again[0]).max() <= 3      # a batch of another size sums in another order
    assert np.array_equal(again, sample(base, ["a man"], [1], steps=2))
    assert np.abs(plain[0].astype(int) - plain[1]).max() > 30
    assert np.abs(again[0].astype(int) - changed[0]).max() > 30


@pytest.mark.parametrize("at", [1, 2], ids=["before a checkpoint", "at the last step"])
def test_a_gradient_that_is_not_finite_reaches_neither_checkpoint_nor_adapter(base: bases.Base, inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    true, kept = torch.nn.utils.clip_grad_norm_, []
    calls = itertools.count(1)

    def clip(parameters: Any, most: float) -> Any:
        norm = true(parameters, most)
        return norm if next(calls) < at else norm * float("nan")

    monkeypatch.setattr("models.diffusion.loop.nn.utils.clip_grad_norm_", clip)
    recipe = LORA.model_copy(update={"steps": 2, "checkpoint_every": 1})
    [result] = fit([dataclasses.replace(job(base, inputs, recipe), on_checkpoint=kept.append)])
    assert isinstance(result.error, NonFiniteLoss)
    assert "the gradient became nan under a loss of" in str(result.error) and f"step {at} of 2" in str(result.error)
    assert result.tensors == {} and [c.step for c in kept] == [1][:at - 1]


def test_a_loss_that_is_not_finite_ends_its_own_job_alone(base: bases.Base, inputs: TrainingInputs) -> None:
    broken = dataclasses.replace(inputs, latents_NCHW=torch.full_like(inputs.latents_NCHW, float("nan")))
    bad, good = fit([job(base, broken), job(base, inputs)])
    assert isinstance(bad.error, NonFiniteLoss)
    assert good.error is None
    assert good.steps == LORA.steps


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
