"""Drawing a subject with their registered model."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from likeness.errors import InputError
from likeness.lineage import walk
from likeness.recipe import RECIPE
from likeness.records import Adapter, TrainingSet
from likeness.stages import Published, StageRef
from models.diffusion import checkpoint
from models.diffusion.methods import adapted
from models.diffusion.sampler import sample as draw_pictures
from tasks.runtime import Tools
from tasks.training import weights_of


def draw(tools: Tools, subject: str, prompt: str, *, count: int, seed: int, out: Path) -> list[Path]:
    """Write `count` pictures of `subject` into `out` and return their paths.

    Raises:
        InputError: the subject has no Release, or `out` cannot be made.
        IntegrityError: the chain behind the Release does not hold.
    """
    tools.standing(subject)
    chain = walk(tools.store, subject).as_json()
    links = {link["stage"]: StageRef(stage=link["stage"], key=link["key"], digest=link["digest"]) for link in chain["chain"]}
    if "register" not in links:
        raise InputError(f"subject {subject!r} has no Release yet: run `likeness run PHOTOS --subject {subject} --class NOUN` until it is accepted")
    adapter, training_set = tools.open(links["train"], subject, Adapter), tools.open(links["assemble"], subject, TrainingSet)
    data = tools.store.get(f"subjects/{subject}/stages/train/{links['train'].key}.json") or b"{}"
    recipe = RECIPE.validate_json(json.dumps(Published.model_validate_json(data).params["recipe"]))
    who = f"{training_set.trigger} {training_set.noun}"
    words = prompt.replace("{who}", who).replace(subject, who)
    words = words if who in words else f"a photo of {who}, {words}"
    tensors, _ = checkpoint.read_adapter(weights_of(tools.store, adapter))
    with adapted(tools.base, tensors, recipe):
        images = draw_pictures(tools.base, [words] * count, [seed + i for i in range(count)], steps=tools.settings.sampling.steps,
                               guidance=tools.settings.sampling.guidance, batch=tools.settings.sampling.batch,
                               progress=lambda done, total: tools.watch("sample", done, total, ""))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{subject}-{seed + i:04d}.png" for i in range(count)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files
