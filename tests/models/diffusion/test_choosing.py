"""Trainings whose checkpoint is chosen: the same bits, the chosen step's adapter, the same end after every interruption. On a pipeline of chance weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from likeness.errors import LikenessError, NonFiniteLoss, ResourceError
from likeness.recipe import Choice, DreamBooth, Lora, Pivotal, Recipe, TextualInversion
from likeness.records import Curve, CurvePoint
from models.diffusion import bases, checkpoint
from models.diffusion.batches import TrainingInputs, encode
from models.diffusion.decoder import PREFIX, DecoderStep
from models.diffusion.loop import Checkpoint, FitResult
from models.diffusion.methods import adapted, as_file, train
from models.diffusion.sampler import sample
from tests.models.diffusion import tiny

CHOICE = Choice(points=3, first=1 / 3)         # steps 2, 4, 6; a checkpoint lies between the first two
LORA = Lora(base="tiny", steps=6, batch=1, rank=2, alpha=1.0, checkpoint_every=3, targets=("attention",), decoder_steps=2, choice=CHOICE)
RECIPES: dict[str, Recipe] = {
    "lora": LORA, "dreambooth": DreamBooth(base="tiny", steps=6, batch=1, checkpoint_every=3, text_encoder=True, choice=CHOICE),
    "textual inversion": TextualInversion(base="tiny", steps=6, batch=1, vectors=2, checkpoint_every=3, learning_rate=0.1, choice=CHOICE),
    "pivotal": Pivotal(base="tiny", steps=6, batch=1, rank=2, vectors=2, targets=("attention",), checkpoint_every=3, inversion_share=0.4, choice=CHOICE),
}
every_method = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
Scores = dict[int, tuple[float | None, float | None]]
MIDDLE: Scores = {2: (0.2, 0.8), 4: (0.6, 0.6), 6: (0.65, 0.1)}
UNMEASURED: Scores = {2: (None, 0.9), 4: (None, None), 6: (None, 0.5)}
FALLING: Scores = {1: (0.7, 0.7), 2: (0.6, 0.6), 3: (0.5, 0.5), 4: (0.9, 0.9)}


class Killed(BaseException):
    """As a process ends that is killed."""


@dataclass
class World:
    base: bases.Base
    inputs: TrainingInputs
    wholes: dict[str, tuple[FitResult, list[Checkpoint]]] = field(default_factory=dict)

    def train(self, recipe: Recipe, curve: Scores, looked: list[int] | None = None, **more: Any) -> FitResult:
        def score(step: int) -> CurvePoint:
            if looked is not None:
                looked.append(step)
            return CurvePoint(step=step, identity=curve[step][0], obedience=curve[step][1], samples=1)
        return train("ada", self.base, self.inputs, recipe, **({"score": score} | more))

    def whole(self, recipe: Recipe) -> tuple[FitResult, list[Checkpoint]]:
        """An undisturbed training whose middle point is best, and its checkpoints as a store gives them back."""
        if recipe.digest not in self.wholes:
            kept: list[bytes] = []
            result = self.train(recipe, MIDDLE, on_checkpoint=lambda c: kept.append(checkpoint.write(c, training="k")))
            self.wholes[recipe.digest] = result, [checkpoint.read(data, training="k") for data in kept]
        return self.wholes[recipe.digest]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bases.CATALOGUE, "tiny", tiny.entry("sd15"))  # type: ignore[arg-type]
        base = bases.load("tiny", folder=tiny.build(tmp_path_factory.mktemp("base"), "sd15", prediction="epsilon"), device="cpu")
        pictures = np.random.default_rng(0).integers(0, 256, (5, tiny.SIDE_PX, tiny.SIDE_PX, 3), np.uint8)
        yield World(base, encode(base, crops_NSSC=pictures[:3], masks_NSS=np.full((3, tiny.SIDE_PX, tiny.SIDE_PX), 255, np.uint8), captions=["sks man", "a sks man", "man sks"],
                                 class_images_MSSC=pictures[3:], class_captions=["man", "a man"], noun="man"))


def same(a: FitResult, b: FitResult) -> bool:
    return (a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
            and (a.losses, a.steps, a.curve, a.device, a.error) == (b.losses, b.steps, b.curve, b.device, b.error))


@every_method
def test_scoring_changes_no_bit_and_what_cannot_be_measured_leaves_the_last_step(world: World, recipe: Recipe) -> None:
    def score(step: int) -> CurvePoint:
        sample(world.base, ["sks man"], [1], steps=1)
        return CurvePoint(step=step, identity=UNMEASURED[step][0], obedience=UNMEASURED[step][1], samples=1)

    plain = world.train(recipe.model_copy(update={"choice": Choice()}), {})
    chosen = world.train(recipe, {}, score=score)
    assert (chosen.error, chosen.steps, chosen.losses) == (None, plain.steps, plain.losses)
    written = as_file(plain.tensors)
    assert chosen.tensors.keys() == written.keys()
    assert all(torch.equal(as_file(chosen.tensors)[k], written[k]) for k in written)
    assert plain.curve is None
    assert chosen.curve is not None
    assert (chosen.curve.chosen, chosen.curve.stopped) == (6, False)


@every_method
def test_a_killed_training_ends_with_the_same_bits_wherever_it_was_killed(world: World, recipe: Recipe) -> None:
    whole, states = world.whole(recipe)
    assert whole.error is None
    assert whole.steps == 4
    assert whole.curve == Curve(chosen=4, points=tuple(CurvePoint(step=s, identity=i, obedience=o, samples=1) for s, (i, o) in MIDDLE.items()))
    assert [(state.step, [p.step for p in state.points]) for state in states] == [(2, [2]), (3, [2]), (4, [2, 4])]
    for state in states if recipe is LORA else states[1:2]:
        looked: list[int] = []
        assert same(world.train(recipe, MIDDLE, looked, resume=state), whole)
        assert looked == [step for step in MIDDLE if step > state.points[-1].step]          # nothing is scored twice


def test_a_training_killed_while_it_scores_scores_that_point_again(world: World) -> None:
    kept: list[Checkpoint] = []

    def killed(step: int) -> CurvePoint:
        if step == 4:
            raise Killed
        return CurvePoint(step=step, identity=0.2, obedience=0.8, samples=1)

    with pytest.raises(Killed):
        world.train(LORA, {}, score=killed, on_checkpoint=kept.append)
    looked: list[int] = []
    assert same(world.train(LORA, MIDDLE, looked, resume=kept[-1]), world.whole(LORA)[0])
    assert (kept[-1].step, looked) == (3, [4, 6])


def test_what_is_scored_is_what_is_written_decoder_and_all(world: World) -> None:
    base, pictures = world.base, {}
    own = [p.detach().clone() for p in base.pipe.vae.decoder.parameters()]

    def score(step: int) -> CurvePoint:
        pictures[step] = sample(base, ["sks man"], [3], steps=2)
        assert any(not torch.equal(p, q) for p, q in zip(base.pipe.vae.decoder.parameters(), own, strict=True))
        return CurvePoint(step=step, identity=MIDDLE[step][0], obedience=MIDDLE[step][1], samples=1)

    result = world.train(LORA, {}, score=score)
    assert all(torch.equal(p, q) for p, q in zip(base.pipe.vae.decoder.parameters(), own, strict=True))
    file = checkpoint.read_adapter(checkpoint.write_adapter(as_file(result.tensors), {"method": "lora"}))[0]
    assert any(key.startswith(PREFIX) for key in file)
    with adapted(base, file, LORA):
        drawn = sample(base, ["sks man"], [3], steps=2)
    assert {step for step, picture in pictures.items() if np.array_equal(picture, drawn)} == {4}


def test_a_training_ends_early_when_both_scores_have_fallen_twice(world: World) -> None:
    recipe = LORA.model_copy(update={"steps": 4, "choice": Choice(points=4, first=0.25)})
    looked, told, kept = list[int](), list[int](), list[Checkpoint]()
    result = world.train(recipe, FALLING, looked, on_report=lambda step, loss: told.append(step), on_checkpoint=kept.append)
    assert (looked, result.steps, result.error) == ([1, 2, 3], 1, None)
    assert result.curve is not None
    assert (result.curve.chosen, result.curve.stopped) == (1, True)
    assert told == [2]                                                    # the decoder, which comes first; the method's first report would have been its last
    assert kept[-1].step == 3
    assert same(world.train(recipe, FALLING, looked, resume=kept[-1]), result)
    assert looked == [1, 2, 3]


@pytest.mark.parametrize("raised", [RuntimeError("CUDA out of memory"), NonFiniteLoss("a loss")], ids=["foreign", "ours"])
def test_a_score_that_fails_ends_the_job_and_leaves_the_base(world: World, raised: Exception) -> None:
    def score(step: int) -> CurvePoint:
        raise raised

    before = {k: v.clone() for k, v in world.base.unet.state_dict().items()}
    result = world.train(LORA, {}, score=score)
    assert isinstance(result.error, LikenessError)
    assert isinstance(result.error, ResourceError if isinstance(raised, RuntimeError) else NonFiniteLoss)
    assert result.tensors == {}
    after = world.base.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_recipe_that_chooses_wants_somebody_who_scores(world: World) -> None:
    with pytest.raises(ValueError, match="needs a score"):
        world.train(LORA, {}, score=None)


def test_what_memory_forced_on_the_decoder_is_counted_after_the_methods_steps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DecoderStep.loss

    def tight(self: DecoderStep, step: int, *, piece: int = 0, of: int = 1) -> torch.Tensor:
        if of == 1:
            raise torch.OutOfMemoryError
        return honest(self, step, piece=piece, of=of)

    monkeypatch.setattr(DecoderStep, "loss", tight)
    recipe = LORA.model_copy(update={"batch": 2, "choice": Choice(points=1), "decoder_steps": 1})
    assert [(plan.from_step, plan.pieces) for plan in world.train(recipe, MIDDLE).device] == [(6, 2)]
