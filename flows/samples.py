"""Drawing a subject with their registered model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from flows.released import newest_release
from models.diffusion.methods import adapted
from models.diffusion.sampler import sample
from tasks.runtime import Tools


def draw(tools: Tools, subject: str, prompt: str, *, count: int, seed: int, out: Path) -> list[Path]:
    """Write `count` pictures of `subject` into `out` and return their paths.

    Raises:
        InputError, RecipeError, IntegrityError: see `newest_release`; `out` cannot be made.
    """
    found = newest_release(tools, subject)
    words = prompt.replace("{who}", found.who).replace(subject, found.who)
    words = words if found.who in words else f"a photo of {found.who}, {words}"
    with adapted(tools.base, found.tensors, found.recipe):
        images = sample(tools.base, [words] * count, [seed + i for i in range(count)], steps=tools.settings.sampling.steps,
                        guidance=tools.settings.sampling.guidance, batch=tools.settings.sampling.batch,
                        progress=lambda done, total: tools.watch("sample", done, total, ""))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{subject}-{seed + i:04d}.png" for i in range(count)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files
