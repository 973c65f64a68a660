"""The contact sheet of `likeness inspect`: every file with its verdict, on one page that needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from likeness.errors import translated
from likeness.report import PhotoView, render_contact_sheet
from likeness.version import code_version
from models.faces.photos import Inspection
from tasks.reporting import webp


def write_contact_sheet(found: Inspection, path: Path, *, expected: str) -> None:
    """Write the page whole or not at all, readable by its owner alone: it shows a person.

    Raises:
        InputError: if it may not be written there.
    """
    photos = [PhotoView(j, webp(found.previews[j.name]) if j.name in found.previews else None) for j in found.judgements]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with translated("writing the contact sheet"):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(render_contact_sheet(photos, found.set, expected=expected, code=code_version()))
        part.replace(path)
