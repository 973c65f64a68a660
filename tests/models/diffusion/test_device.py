"""What happens where a step does not fit into memory: pieces, then activations computed twice, and what is left of it in the records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch

from likeness.errors import ResourceError
from likeness.recipe import Choice, DreamBooth, Lora, Objective, Pivotal, Recipe, TextualInversion
from likeness.records import Adapter, BlobRef, CurvePoint, DevicePlan
from models.diffusion import bases, checkpoint
from models.diffusion.batches import TrainingInputs, encode
from models.diffusion.loop import Checkpoint, Job, fit
from models.diffusion.methods import plan_of, step_of, train
from tests.models.diffusion import tiny

LORA = Lora(steps=4, batch=4, rank=2, targets=("attention",), checkpoint_every=2)
RECIPES: dict[str, Recipe] = {
    "lora with text": LORA.model_copy(update={"targets": ("attention", "text_encoder")}), "dreambooth": DreamBooth(batch=3),
    "textual inversion": TextualInversion(batch=4, vectors=2), "pivotal": Pivotal(batch=4, rank=2, vectors=2, steps=2, inversion_share=0.1),
    "lora with dop": LORA.model_copy(update={"objective": Objective(prior="dop", prior_weight=2.0)}), "dreambooth alone": DreamBooth(batch=1, text_encoder=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bases.Base]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bases.CATALOGUE, "tiny", tiny.entry("sdxl"))  # type: ignore[arg-type]
        yield bases.load("tiny", folder=tiny.build(tmp_path_factory.mktemp("base"), "sdxl", prediction="epsilon"), device="cpu")


@pytest.fixture(scope="module")
def inputs(base: bases.Base) -> TrainingInputs:
    pictures = np.random.default_rng(0).integers(0, 256, (5, tiny.SIDE_PX, tiny.SIDE_PX, 3), np.uint8)
    return encode(base, crops_NSSC=pictures[:3], masks_NSS=np.full((3, tiny.SIDE_PX, tiny.SIDE_PX), 255, np.uint8), captions=["sks man", "a sks man", "sks man, old"],
                  class_images_MSSC=pictures[3:], class_captions=["man", "a man"], noun="man")


@contextmanager
def room_for(base: bases.Base, pictures: int, *, twice: int | None = None, from_call: int = 0) -> Iterator[list[int]]:
    """A device on which a pass with gradient holds so many pictures, or `twice` with gradient checkpointing; yields the sizes of all passes that fitted."""
    fitted: list[int] = []
    calls = 0

    def check(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1
        size = len(args[0])
        most = twice if twice is not None and base.unet.is_gradient_checkpointing else pictures
        if torch.is_grad_enabled() and calls > from_call and size > most:
            if calls % 2:
                torch.empty(10 ** 15)              # what a CPU's own allocator says
            raise torch.OutOfMemoryError(f"{size} pictures")
        fitted.append(size)

    hook = base.unet.register_forward_pre_hook(check)
    try:
        yield fitted
    finally:
        hook.remove()


def job(base: bases.Base, inputs: TrainingInputs, recipe: Recipe = LORA, **more: Any) -> Job:
    return Job("ada", lambda: step_of(base, inputs, recipe), plan_of(recipe), **{"recompute": base.recompute, **more})


def gradient(base: bases.Base, inputs: TrainingInputs, recipe: Recipe, *, of: int, twice: bool = False) -> tuple[float, list[torch.Tensor]]:
    step = step_of(base, inputs, recipe)
    base.recompute(twice)
    try:
        losses = []
        for piece in range(of):
            loss = step.loss(1, piece=piece, of=of)
            loss.backward()
            losses.append(float(loss.detach()))
        return sum(losses), [p.grad.clone() for group in step.groups() for p in group.parameters if p.grad is not None]
    finally:
        base.recompute(False)
        step.close()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_pieces_and_recomputing_have_the_gradient_of_the_whole(base: bases.Base, inputs: TrainingInputs, recipe: Recipe) -> None:
    step = step_of(base, inputs, recipe)
    pictures = step.pictures(1)
    step.close()
    loss, whole = gradient(base, inputs, recipe, of=1)
    assert whole
    assert sum(float(g.square().sum()) for g in whole) > 0
    for of, twice in ((2, False), (pictures, False), (1, True)):
        total, parts = gradient(base, inputs, recipe, of=of, twice=twice)
        assert total == pytest.approx(loss, rel=1e-5)
        assert len(parts) == len(whole)
        scale = max(float(g.abs().max()) for g in whole)
        assert max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) < 2e-5 * scale


@pytest.mark.parametrize(("room", "plans", "sizes"), [
    ({"pictures": 6}, [], {6}), ({"pictures": 3}, [(0, 2, False)], {3}), ({"pictures": 2}, [(0, 2, False), (0, 4, False)], {1, 2}),
    ({"pictures": 1}, [(0, 2, False), (0, 4, False), (0, 6, False)], {1}),
    ({"pictures": 0, "twice": 1}, [(0, 2, False), (0, 4, False), (0, 6, False), (0, 6, True)], {1}),
], ids=["enough", "half", "a third", "one", "one, twice"])
def test_a_step_that_does_not_fit_is_taken_in_smaller_ones(base: bases.Base, inputs: TrainingInputs, room: dict[str, int], plans: list[tuple[int, int, bool]],
                                                           sizes: set[int]) -> None:
    [undisturbed] = fit([job(base, inputs)])
    with room_for(base, **room) as fitted:
        [result] = fit([job(base, inputs)])
    assert result.error is None, result.error
    assert [(p.from_step, p.pieces, p.gradient_checkpointing) for p in result.device] == plans
    assert set(fitted) == sizes
    assert result.losses == ((4, pytest.approx(undisturbed.losses[0][1], rel=1e-4)),)
    assert not base.unet.is_gradient_checkpointing
    assert all(torch.allclose(result.tensors[k], undisturbed.tensors[k], atol=1e-3) for k in result.tensors)
    assert undisturbed.device == ()


def test_memory_that_runs_out_later_costs_nothing_that_was_learnt_and_a_resumed_training_knows(base: bases.Base, inputs: TrainingInputs) -> None:
    kept: list[Checkpoint] = []
    with room_for(base, 3, from_call=1):
        [whole] = fit([job(base, inputs, on_checkpoint=kept.append)])
    assert whole.device == (DevicePlan(from_step=1, pieces=2),)
    again = checkpoint.read(checkpoint.write(kept[0], training="k"), training="k")
    assert again.device == whole.device
    with room_for(base, 3) as fitted:
        [resumed] = fit([job(base, inputs, resume=again)])
    assert set(fitted) == {3}
    assert resumed.device == whole.device
    assert all(torch.equal(resumed.tensors[k], whole.tensors[k]) for k in whole.tensors)


def test_where_nothing_helps_the_job_ends_alone_and_says_what_would(base: bases.Base, inputs: TrainingInputs) -> None:
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    with room_for(base, 0):
        [first, second] = fit([job(base, inputs), job(base, inputs, recompute=None)])
    assert isinstance(first.error, ResourceError)
    assert "one picture at a time and with gradient checkpointing" in first.error.message
    assert isinstance(second.error, ResourceError)
    assert "gradient checkpointing" not in second.error.message
    after = base.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    [third] = fit([job(base, inputs)])
    assert third.error is None


def test_a_training_that_fitted_has_the_digest_it_always_had() -> None:
    adapter = Adapter(training_set="a" * 64, recipe="b" * 64, base="c" * 64, weights=BlobRef(key="k", sha256="d" * 64, size=1, media="m"), losses=((1, 0.5),), steps=1)
    assert "device_plans" not in adapter.plain()
    forced = adapter.model_copy(update={"device_plans": (DevicePlan(from_step=0, pieces=2),)})
    assert forced.digest != adapter.digest
    assert Adapter.read(forced.model_dump_json()) == forced


# -- what no step reads leaves the device

TOWERS = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(("recipe", "reads"), [
    (LORA, False), (RECIPES["lora with text"], True), (RECIPES["lora with dop"], False), (RECIPES["dreambooth"], False), (RECIPES["dreambooth alone"], True),
    (RECIPES["textual inversion"], True), (RECIPES["pivotal"], True),
])
def test_what_a_method_does_not_read_rests_while_it_trains_and_no_longer(base: bases.Base, inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, reads: bool) -> None:
    away: set[str] = set()
    seen: list[set[str]] = []

    @contextmanager
    def resting(self: bases.Base, parts: Any) -> Iterator[None]:
        away.update(parts)
        yield
        away.difference_update(parts)

    def awake(part: str) -> Any:
        def look(module: Any, args: Any) -> None:
            assert part not in away, f"{part} is read while it rests"
        return look

    parts = {"vae": [base.pipe.vae.encoder, base.pipe.vae.decoder], **{tower: [getattr(base.pipe, tower)] for tower in TOWERS}}
    hooks = [module.register_forward_pre_hook(awake(part)) for part, modules in parts.items() for module in modules]
    monkeypatch.setattr(bases.Base, "resting", resting)
    recipe = recipe.model_copy(update={"steps": 2, "checkpoint_every": 2, "decoder_steps": 1, "choice": Choice(points=1)})
    scored: list[set[str]] = []

    def score(step: int) -> CurvePoint:
        scored.append(set(away))
        return CurvePoint(step=step, identity=None, obedience=None, samples=1)

    result = train("ada", base, inputs, recipe, score=score, on_report=lambda step, loss: seen.append(set(away)))
    for hook in hooks:
        hook.remove()
    assert result.error is None
    assert scored == [set()], "whoever scores reads everything"
    assert seen == [set(), {"vae"} if reads else {"vae", *TOWERS}]          # the decoder's step, then the method's


def test_what_rests_comes_back_after_an_error_too(base: bases.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, str]] = []
    names = {id(getattr(base.pipe, part)): part for part in ("vae", *TOWERS)}
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moved.append((names[id(self)], str(where))))
    with base.resting(("vae", *TOWERS)):
        pass
    assert moved == [], "on a CPU nothing moves"
    elsewhere = dataclasses.replace(base, device=torch.device("cuda", 0))
    with suppress(KeyError), elsewhere.resting(("vae", *TOWERS)):
        moved.append(("then", "an error"))
        raise KeyError
    assert moved[:4] == [("vae", "cpu"), *((tower, "cpu") for tower in TOWERS), ("then", "an error")]
    assert moved[4:] == [("vae", "cuda:0"), *((tower, "cuda:0") for tower in TOWERS)]
