"""Handing a subject's registered adapter to other programs."""

from __future__ import annotations

from pathlib import Path

from flows.released import newest_release
from likeness.errors import RecipeError, translated
from likeness.recipe import DreamBooth
from models.diffusion.exports import FORMATS, embedding_file, lora_file, write_pipeline, write_vae
from tasks.runtime import Tools


def export(tools: Tools, subject: str, form: str, *, out: Path | None) -> Path:
    """Write the subject's newest adapter in a format; returns the file, or for DreamBooth and a VAE the folder.

    Raises:
        InputError, IntegrityError: see `newest_release`; `out` cannot be written.
        RecipeError: no such format, it does not fit the method, or the folder is in use; see `newest_release` too.
    """
    if form not in FORMATS:
        raise RecipeError(f"there is no format {form!r}: choose {', '.join(FORMATS)}")
    found = newest_release(tools, subject)
    with translated(f"writing the {form} export"):
        if form == "vae" or (isinstance(found.recipe, DreamBooth) and form == "diffusers"):
            target = out or Path(f"{subject}-{form}")
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise RecipeError(f"{target.name!r} is there already and not an empty folder: name another with --out")
            if isinstance(found.recipe, DreamBooth) and form == "diffusers":
                write_pipeline(tools.base, found.tensors, found.recipe, target)
            else:
                write_vae(tools.base, found.tensors, found.recipe, target)
            return target
        data = embedding_file(found.tensors, found.recipe, token=f"<{subject}>") if form == "embedding" else lora_file(
            found.tensors, found.recipe, form, family=tools.base_ref.family)
        target = out or Path(f"{subject}-{form}.safetensors")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return target
