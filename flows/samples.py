"""Drawing a subject with their registered model, or whatever a file of another program holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flows.released import newest_release
from likeness.errors import RecipeError
from likeness.gate import is_showable
from models.diffusion.imports import carrying, read_foreign
from models.diffusion.methods import adapted
from models.diffusion.sampler import sample
from models.quality.unsafe import find_unsafe
from tasks.runtime import Tools

ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def is_file(subject: str) -> bool:
    """Whether what stands in a subject's place is a file of weights; no subject's id has a dot."""
    return subject.endswith(ENDINGS)


@dataclass(frozen=True)
class Drawn:
    """The files that were written, and of what was not: (seed, why)."""

    files: list[Path]
    withheld: list[tuple[int, str]]


def draw(tools: Tools, subject: str, prompt: str, *, count: int, seed: int, out: Path, unsafe: bool = False) -> Drawn:
    """Write `count` pictures of `subject` into `out`; unsafe ones, and those that could not be judged for that, only with `unsafe`.

    Raises:
        InputError, RecipeError, IntegrityError: see `newest_release`; `out` cannot be made.
    """
    found = newest_release(tools, subject)
    words = called(prompt, subject, found.who)
    with adapted(tools.base, found.tensors, found.recipe):
        return _draw(tools, words, subject, count=count, seed=seed, out=out, unsafe=unsafe)


def called(prompt: str, subject: str, who: str) -> str:
    """The prompt with `who` in the place of `{who}`, or else of the subject's id where that is a word of its own, of more than one letter; without either, `who` comes first."""
    if "{who}" in prompt:
        return prompt.replace("{who}", who)
    words = re.sub(rf"(?<![\w-]){re.escape(subject)}(?![\w-])", lambda _: who, prompt) if len(subject) > 1 else prompt
    return words if who in words else f"a photo of {who}, {words}"


def draw_file(tools: Tools, file: Path, prompt: str, *, embedding: Path | None, count: int, seed: int, out: Path, unsafe: bool = False) -> Drawn:
    """Write `count` pictures of what a LoRA file or an embedding holds, under the prompt as it is written; `{who}` is the embedding's word. As `draw` otherwise.

    Nothing is registered: nobody knows what the file was trained from.

    Raises:
        InputError, RecipeError: see `read_foreign` and `carrying`; `{who}` without an embedding; `out` cannot be made.
    """
    held = [read_foreign(f, tools.base) for f in (file, embedding) if f is not None]
    if "{who}" in prompt and not any(f.vectors for f in held):
        raise RecipeError(f"{file.name!r} is a LoRA file and says no word for what it holds: write the word that it was trained with in the place of {{who}}")
    with carrying(tools.base, *held):
        return _draw(tools, prompt.replace("{who}", tools.base_trigger), file.stem, count=count, seed=seed, out=out, unsafe=unsafe)


def _draw(tools: Tools, words: str, name: str, *, count: int, seed: int, out: Path, unsafe: bool) -> Drawn:
    sampling, seeds = tools.settings.sampling, [seed + i for i in range(count)]
    images = sample(tools.base, [words] * count, seeds, steps=sampling.steps, guidance=sampling.guidance, batch=sampling.batch,
                    progress=lambda done, total: tools.watch("sample", done, total, ""))
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    withheld: list[tuple[int, str]] = []
    for number, image in zip(seeds, images, strict=True):
        found = () if unsafe else find_unsafe(image, tools.unsafe)
        if not is_showable(found):
            withheld.append((number, "unsafe" if found[0].code == "unsafe" else "could not be judged"))
            continue
        file = out / f"{name}-{number:04d}.png"
        Image.fromarray(image).save(file)
        files.append(file)
    return Drawn(files, withheld)
