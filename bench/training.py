"""One training of ours as a process of its own, so that it is measured as the reference scripts are: `python -m bench.training FOLDER`.

Reads `inputs.npz`, `inputs.json`; writes `adapter.safetensors`, for a LoRA also `at-STEP.safetensors` at each checkpoint. The bench starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from likeness.recipe import RECIPE, Recipe
from models.diffusion import bases
from models.diffusion.batches import encode
from models.diffusion.loop import Checkpoint
from models.diffusion.methods import as_file, train

ADAPTER = "adapter.safetensors"


def prepare(folder: Path, recipe: Recipe, *, noun: str, crops: NDArray[np.uint8], masks: NDArray[np.uint8], captions: Sequence[str],
            class_images: NDArray[np.uint8], class_captions: Sequence[str]) -> None:
    """Write what `main` reads."""
    np.savez(folder / "inputs.npz", crops=crops, masks=masks, class_images=class_images)
    (folder / "inputs.json").write_text(json.dumps({"recipe": recipe.plain(), "noun": noun, "captions": list(captions), "class_captions": list(class_captions)}))


def main(folder: Path) -> None:
    """Train what lies in `folder`."""
    told = json.loads((folder / "inputs.json").read_text())
    recipe = RECIPE.validate_json(json.dumps(told["recipe"]))
    base = bases.load(recipe.base)
    with np.load(folder / "inputs.npz", allow_pickle=False) as held:
        inputs = encode(base, crops_NSSC=held["crops"], masks_NSS=held["masks"], captions=told["captions"], class_images_MSSC=held["class_images"],
                        class_captions=told["class_captions"], noun=told["noun"])

    def report(step: int, loss: float) -> None:
        if step <= recipe.steps:          # the decoder's steps come after: they are counted in the whole, not in a step
            print(f"Steps: {step}/{recipe.steps} [loss {loss:.4f}]", flush=True)

    def keep(checkpoint: Checkpoint) -> None:
        if recipe.method == "lora":
            save_file(as_file(checkpoint.tensors), folder / f"at-{checkpoint.step}.safetensors")

    result = train("bench", base, inputs, recipe, on_report=report, on_checkpoint=keep)
    if result.error is not None:
        raise result.error
    save_file(as_file(result.tensors), folder / ADAPTER)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
