"""train: a TrainingSet and a Recipe become an Adapter. The GPU role: reads portraits and captions, writes adapters; never reads photos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from prefect import task

from likeness.errors import BadCheckpoint, InputError
from likeness.once import Claim
from likeness.recipe import Recipe
from likeness.records import Adapter, TrainingSet
from likeness.stages import Call, StageRef
from likeness.store import Store, put_blob, read_blob
from models.diffusion import checkpoint, methods
from models.diffusion.batches import encode
from models.diffusion.loop import Checkpoint
from models.faces.portraits import SIDE_IOD
from models.quality import choice, measure
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime


@task(name="train", task_run_name="train {subject}", **RETRIED)
def train(subject: str, training_set: StageRef, recipe: Recipe) -> Outcome:
    """Train the subject's adapter, or go on from its last good checkpoint."""
    tools = runtime()
    call = Call(stage="train", subject=subject, inputs=(training_set,), params={"recipe": recipe.plain(), "base": tools.base_ref.digest} | _choice(tools, recipe))
    return tools.once(call, lambda claim: _train(tools, call, tools.open(training_set, subject, TrainingSet), recipe, claim), Adapter)


def _train(tools: Tools, call: Call, training_set: TrainingSet, recipe: Recipe, claim: Claim) -> Adapter:
    base, store = tools.base, tools.store
    if not training_set.portraits:
        raise InputError("no portrait is left to train on: add photos")
    side_px = base.ref.resolution_px
    class_images, class_captions = (tools.class_pictures(training_set.noun, beat=claim.beat) if recipe.objective.wants_class_pictures
                                    else tools.shipped_class_pictures(training_set.noun) if recipe.decoder_steps else (np.zeros((0, side_px, side_px, 3), np.uint8), []))
    inputs = encode(base, crops_NSSC=pictures.stack(store, [p.crop for p in training_set.portraits]),
                    masks_NSS=pictures.stack(store, [p.mask for p in training_set.portraits]),
                    captions=[c.text for c in training_set.captions], class_images_MSSC=class_images, class_captions=class_captions,
                    noun=training_set.noun, originals_px=[p.face.eye_distance_px * SIDE_IOD[p.framing] for p in training_set.portraits])
    folder = call.path.removesuffix(".json")
    total = recipe.steps + recipe.decoder_steps
    progress = tools.progress(call.stage, total)

    def report(step: int, loss: float) -> None:
        progress(step, f"loss {loss:.3f}")
        claim.beat(f"step {step} of {total}")

    score = scorer(tools, training_set, recipe, lambda done, of: claim.beat(f"scoring a checkpoint, picture {done} of {of}")) if recipe.choice.points else None
    result = methods.train(call.subject, base, inputs, recipe, score=score, resume=newest_checkpoint(store, folder, call.key), on_report=report,
                           on_checkpoint=_keeper(store, folder, call.key))
    if result.error is not None:
        raise result.error
    header = {"method": recipe.method, "training_set": training_set.digest, "recipe": recipe.digest, "base": base.ref.digest, "trigger": training_set.trigger}
    data = checkpoint.write_adapter(methods.as_file(result.tensors), header)
    weights = put_blob(store, f"subjects/{call.subject}/adapters", data, media="application/vnd.safetensors")
    for key in list(store.list(folder + "/")):
        store.delete(key)          # the adapter is written: its checkpoints have served
    return Adapter(training_set=training_set.digest, recipe=recipe.digest, base=base.ref.digest, weights=weights, losses=result.losses, steps=result.steps,
                   device_plans=result.device, curve=None if result.curve is None else result.curve.model_copy(
                       update={"witnesses": tuple(p.digest for p in choice.witnesses_for_choice(training_set.held_out))}))


def _choice(tools: Tools, recipe: Recipe) -> dict[str, Any]:
    """What a training reads beside its recipe where it chooses among checkpoints; nothing where it does not, so that its key is as ever."""
    if not recipe.choice.points:
        return {}
    settings = tools.settings
    return {"choice": {"prompts": [prompt.plain() for prompt in settings.battery.prompts], "guidance": settings.sampling.guidance, "batch": settings.sampling.batch,
                       "backend": tools.faces.recogniser_name, "bank": tools.bank.digest, "slots": tools.slots_digest}}


def scorer(tools: Tools, training_set: TrainingSet, recipe: Recipe, tell: Callable[[int, int], None] = lambda done, of: None) -> choice.Scorer:
    """Who scores the checkpoints of this training."""
    people = [p for p in (*training_set.portraits, *training_set.held_out) if p.framing == "tight"]
    witnesses = choice.witnesses_for_choice(training_set.held_out)
    identity = measure.Identity(tools.faces.recogniser_name, tools.bank.digest, np.asarray([p.embedding for p in witnesses], np.float32),
                                np.asarray([p.embedding for p in people], np.float32), tools.bank.embeddings)
    sheet = choice.Sheet.of(tools.settings.battery.prompts, training_set.captions, who=f"{training_set.trigger} {training_set.noun}", seeds=recipe.choice.seeds)
    return choice.Scorer(tools.base, tools.faces, tools.slots, sheet, identity, recipe.choice, tools.settings.sampling.guidance, tools.settings.sampling.batch, tell)


def newest_checkpoint(store: Store, folder: str, training: str) -> Checkpoint | None:
    """The last checkpoint of this training that is whole; a damaged one is passed over for the one before it."""
    for key in sorted(store.list(folder + "/"), reverse=True):
        data = store.get(key)
        if data is None:
            continue
        try:
            return checkpoint.read(data, training=training)
        except BadCheckpoint:
            store.delete(key)      # a new one may be written under the same name
    return None


def _keeper(store: Store, folder: str, training: str) -> Callable[[Checkpoint], None]:
    def keep(state: Checkpoint) -> None:
        store.put_if_absent(f"{folder}/checkpoint-{state.step:06d}.safetensors", checkpoint.write(state, training=training))
        for key in sorted(store.list(folder + "/"))[:-2]:      # two are kept: a torn write of the last must not cost everything
            store.delete(key)
    return keep


def weights_of(store: Store, adapter: Adapter) -> bytes:
    """The verified safetensors bytes of an adapter."""
    return read_blob(store, adapter.weights)
