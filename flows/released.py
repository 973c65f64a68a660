"""What a subject's newest Release is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass

from torch import Tensor

from likeness.errors import InputError, RecipeError
from likeness.lineage import walk
from likeness.recipe import RECIPE, Recipe
from likeness.records import Adapter, TrainingSet
from likeness.stages import Published, StageRef
from models.diffusion import checkpoint
from tasks.runtime import Tools
from tasks.training import weights_of


@dataclass(frozen=True)
class Released:
    """A registered adapter, read and verified."""

    recipe: Recipe
    tensors: dict[str, Tensor]
    who: str                      # what stands for the person in a prompt


def newest_release(tools: Tools, subject: str) -> Released:
    """The subject's newest registered adapter.

    Raises:
        InputError: the subject has no Release.
        RecipeError: it was trained on another base than the one that is set.
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
    if adapter.base != tools.base_ref.digest:
        raise RecipeError(f"the adapter of {subject!r} was trained on base {recipe.base!r} as it was then, set is {tools.base_ref.name!r} with other files: "
                          "set `base` and `base_folder` to the one it was trained on, or run `likeness run` again")
    tensors, _ = checkpoint.read_adapter(weights_of(tools.store, adapter))
    return Released(recipe, tensors, f"{training_set.trigger} {training_set.noun}")
