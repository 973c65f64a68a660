"""The four methods: what trains each, and how what was trained is put back into a base.

An adapter's file holds up to four kinds of tensors: low-rank factors (`unet.*`, `text_encoder.*`, as diffusers' own LoRA files name them), vectors
of a word (`vectors.WORD`, K x D), differences from the base's weights (`delta.unet.*`, `delta.text_encoder.*`), and those of
the VAE's decoder (`delta.vae.*`) if the recipe tunes it. What belongs to the second text
tower of SDXL is called `text_encoder_2.*`, `vectors_2.WORD`, `delta.text_encoder_2.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from likeness.choice import knee, stop_early
from likeness.errors import BadCheckpoint, LikenessError, translated
from likeness.recipe import DreamBooth, Lora, Pivotal, Recipe, TextualInversion
from likeness.records import Curve, CurvePoint, DevicePlan
from models.diffusion.bases import Base
from models.diffusion.batches import TrainingInputs
from models.diffusion.decoder import PARTS, PREFIX, DecoderStep, decoder_plan
from models.diffusion.dreambooth import DreamBoothStep, Weights, trained_parts
from models.diffusion.loop import Checkpoint, FitResult, Job, Plan, Step, fit
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


def idle_parts(base: Base, recipe: Recipe) -> tuple[str, ...]:
    """The parts of the pipeline that a method's steps do not read: latents are encoded once, and so are texts where no text tower and no word of one is trained."""
    reads = isinstance(recipe, TextualInversion | Pivotal) or (isinstance(recipe, DreamBooth) and recipe.text_encoder) or (isinstance(recipe, Lora) and "text_encoder" in recipe.targets)
    return ("vae",) if reads else ("vae", *base.towers)


def _fit(base: Base, recipe: Recipe, job: Job) -> FitResult:
    """One job of the method, with the device to itself."""
    with translated(f"making room for {job.name} and leaving it"), base.resting(idle_parts(base, recipe)):
        [result] = fit([job])
    return result


Score = Callable[[int], CurvePoint]       # of the checkpoint of a step, whose adapter is in place in the base meanwhile


def train(name: str, base: Base, inputs: TrainingInputs, recipe: Recipe, *, score: Score | None = None, resume: Checkpoint | None = None,
          on_report: Callable[[int, float], None] = lambda step, loss: None, on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None) -> FitResult:
    """A whole training: the method's job, then the decoder's if the recipe has one. The result's losses are the method's, its tensors are of both.

    Where the recipe chooses among checkpoints, `score` is asked for the worth of each; see `_chosen`.

    `on_report` is told (step, loss) of both, steps counted through; only the method's job writes checkpoints and resumes.
    """
    if recipe.choice.points:
        if score is None:
            raise ValueError("a recipe with choice.points needs a score")
        return _chosen(name, base, inputs, recipe, score, resume, on_report, on_checkpoint)
    result = _fit(base, recipe, Job(name, lambda: step_of(base, inputs, recipe), plan_of(recipe), resume=resume, recompute=base.recompute, on_report=on_report,
                                    on_checkpoint=on_checkpoint))
    if result.error is not None or not recipe.decoder_steps:
        return result
    [decoder] = fit([_decoder(name, base, inputs, recipe, lambda step, loss: on_report(recipe.steps + step, loss))])
    return replace(result, tensors=result.tensors | decoder.tensors, device=result.device + _after(recipe, decoder.device), error=decoder.error)


def _chosen(name: str, base: Base, inputs: TrainingInputs, recipe: Recipe, score: Score, resume: Checkpoint | None,
            on_report: Callable[[int, float], None], on_checkpoint: Callable[[Checkpoint], None]) -> FitResult:
    """A training whose best checkpoint is the result, scored as it would be written, with the decoder that it will have.

    The decoder comes first: it does not depend on the method, so it is the same as afterwards. Up to each point the method's job goes on from its own
    state, as a resumed one does, so its bits are those of a training without points. A checkpoint carries the points so far and the best adapter, so a
    training that goes on scores nothing twice; its decoder it tunes again, to the same end.
    """
    decoder = FitResult(name)
    if recipe.decoder_steps:
        [decoder] = fit([_decoder(name, base, inputs, recipe, on_report)])
        if decoder.error is not None:
            return decoder
    points, best, state = (resume.points, resume.best, resume) if resume is not None else ((), {}, None)
    part = FitResult(name, losses=tuple(state.losses), device=state.device) if state is not None else FitResult(name)
    for at in recipe.choice.at(recipe.steps):
        if points and at <= points[-1].step:
            continue
        if stop_early(points):
            break
        part = _fit(base, recipe, Job(name, lambda: step_of(base, inputs, recipe), plan_of(recipe), resume=state, until=at, recompute=base.recompute,
                                      on_report=lambda step, loss: on_report(recipe.decoder_steps + step, loss),
                                      on_checkpoint=lambda c, points=points, best=best: on_checkpoint(replace(c, points=points, best=best))))  # type: ignore[misc]
        if part.error is not None or part.state is None:
            return part
        tensors = as_file(part.tensors | decoder.tensors)
        try:
            with translated(f"scoring step {at} of {name}"), adapted(base, tensors, recipe):
                points = (*points, score(at))
        except LikenessError as error:
            return FitResult(name, error=error)
        if knee(points).step == at:
            best = tensors
        state = replace(part.state, points=points, best=best)
        if at < recipe.steps:
            on_checkpoint(state)
    chosen = knee(points).step
    return FitResult(name, best, part.losses, chosen, part.device + _after(recipe, decoder.device),
                     curve=Curve(points=points, chosen=chosen, stopped=points[-1].step < recipe.steps))


def _decoder(name: str, base: Base, inputs: TrainingInputs, recipe: Recipe, on_report: Callable[[int, float], None]) -> Job:
    return Job(name, lambda: DecoderStep(base, inputs, recipe), decoder_plan(recipe), on_report=on_report)


def _after(recipe: Recipe, plans: tuple[DevicePlan, ...]) -> tuple[DevicePlan, ...]:
    """What memory forced on the decoder, its steps counted after the method's."""
    return tuple(plan.model_copy(update={"from_step": recipe.steps + plan.from_step}) for plan in plans)


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
    parts: dict[str, dict[str, Tensor]] = {"decoder": {}, "delta": {}, "vectors": {}, "factors": {}}
    for key, tensor in tensors.items():
        kind = "decoder" if key.startswith(PREFIX) else next((kind for kind in ("delta", "vectors") if key.startswith(kind)), "factors")
        parts[kind][key.removeprefix("delta.")] = tensor
    wanted = {"dreambooth": {"delta"}, "lora": {"factors"}, "textual_inversion": {"vectors"}, "pivotal": {"factors", "vectors"}}[recipe.method]
    if recipe.decoder_steps:
        wanted = wanted | {"decoder"}
    if {kind for kind, held in parts.items() if held} != wanted:
        raise BadCheckpoint(f"this adapter holds {', '.join(sorted(k for k, v in parts.items() if v)) or 'nothing'}, a {recipe.method} adapter is "
                            f"{' and '.join(sorted(wanted))}: name the recipe it came from")
    with ExitStack() as stack:
        if recipe.decoder_steps:
            decoder = Weights(base, PARTS)
            stack.callback(decoder.close)
            decoder.shift(parts["decoder"])
        if isinstance(recipe, DreamBooth):
            weights = Weights(base, trained_parts(base, recipe))
            stack.callback(weights.close)
            weights.shift(parts["delta"])
        if isinstance(recipe, TextualInversion | Pivotal):
            stack.callback(put_words(base, parts["vectors"], count=recipe.vectors).close)
        if isinstance(recipe, Lora | Pivotal):
            factors = Factors(base, recipe, seed=recipe.seed)
            stack.callback(factors.close)
            factors.restore(parts["factors"])
        yield
