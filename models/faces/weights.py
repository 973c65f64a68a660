"""Weights that lie in a folder of the user's: vouched for by their sha256 before any loader opens them. Nothing is downloaded.

A hash is vouched for by CATALOGUE below or by the user's own settings. Loaders are handed a private folder that holds nothing but the
bytes that were hashed: what was checked is what is loaded, and a file that nobody vouches for is never opened by them.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from likeness.errors import IntegrityError, RecipeError
from likeness.settings import LocalWeights

INSIGHTFACE_LICENCE = "insightface's published packs are for non-commercial research only"
UNKNOWN_LICENCE = "weights that Likeness does not know: their licence is yours to check"


@dataclass(frozen=True)
class Known:
    """What is known about one file of weights."""

    what: str
    licence: str
    same_person_cosine: float | None = None      # of recognisers: measured as docs/faces.md says; None: not measured here


# By sha256. Published files of which we had no copy carry no measured cosine.
CATALOGUE: Mapping[str, Known] = {
    "32d20c77b9e2dc1d07e94c2ab9d25bdd5cd05eddbe0b46e7b38e7a1eca22e99a": Known("SCRFD 2.5G, five points", INSIGHTFACE_LICENCE),
    "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91": Known("SCRFD 10G, det_10g.onnx of buffalo_l", INSIGHTFACE_LICENCE),
    "f055d9c9a4d826d198c42666590fdefa0fdc1374a75ccb6306c3d1b1bf8f74c5": Known("MobileFaceNet, 128-d", "no licence stated by its publisher", 0.32),
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43": Known("ArcFace ResNet-50, w600k_r50.onnx of buffalo_l", INSIGHTFACE_LICENCE),
    "7c417d4a43c5e2100ef40c2fbd2177d2fd0e5090d8e87c0fa31806cfb895c12f": Known("RetinaFace MobileNet 0.25, retrained", "MIT"),
    "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220": Known("RetinaFace MobileNet 0.25 of facexlib 0.1.0", "MIT"),
    "6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d": Known("RetinaFace ResNet-50 of facexlib 0.1.0", "MIT"),
    "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567": Known(
        "BiSeNet, parsing_bisenet.pth of facexlib 0.2.0", "MIT; trained on CelebAMask-HQ, which is for non-commercial research"),
}


def licence_of(files: Mapping[str, str]) -> str:
    """The licences of some files {name: sha256}, each once."""
    found = [CATALOGUE[sha256].licence if sha256 in CATALOGUE else UNKNOWN_LICENCE for sha256 in files.values()]
    return "; ".join(dict.fromkeys(found))


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vouched(weights: LocalWeights, names: Iterable[str], *, setting: str) -> tuple[dict[str, str], dict[str, str]]:
    """Those of `names` in the folder that catalogue or settings vouch for, and those that nobody does, as {name: sha256}.

    Args:
        setting: key of the settings that `weights` stands under, for messages: "backends.facexlib".

    Raises:
        RecipeError: there is no such folder, or it lacks a file whose hash is stated.
        IntegrityError: a file is not what its stated hash says.
    """
    folder = weights.folder
    if folder is None or not folder.is_dir():
        found = "nothing" if folder is None else f"{folder.name!r}, which is no folder here"
        raise RecipeError(f"{setting}.folder: found {found}, a local folder of weights is needed: Likeness downloads none; put the files there yourself and name it")
    if missing := sorted(name for name in weights.sha256 if not (folder / name).is_file()):
        raise RecipeError(f"{setting}.sha256 names {', '.join(missing)}, which {setting}.folder does not hold: put the file there, or take the line out")
    known: dict[str, str] = {}
    strange: dict[str, str] = {}
    for name in sorted({*names, *weights.sha256}):
        if not (folder / name).is_file():
            continue
        found, stated = sha256_of(folder / name), weights.sha256.get(name)
        if stated is not None and stated != found:
            raise IntegrityError(f"{name} has sha256 {found}, {setting}.sha256 states {stated}: get the file again from where you trust it; it was not opened")
        (known if stated or found in CATALOGUE else strange)[name] = found
    return known, strange


def not_vouched(strange: Mapping[str, str], *, needed: str, setting: str) -> IntegrityError | RecipeError:
    """The error for a folder that lacks `needed` among its files that are vouched for."""
    if not strange:
        return RecipeError(f"{setting}.folder holds no {needed}: put the file there; Likeness downloads none")
    lines = ", ".join(f'"{name}" = "{sha256}"' for name, sha256 in sorted(strange.items()))
    return IntegrityError(f"{setting}.folder holds no {needed} that anybody vouches for; it was not opened. Found {{ {lines} }}: "
                          f"if that is what its publisher names, state it as {setting}.sha256; if not, get the file again")


@contextmanager
def private_copy(folder: Path, files: Mapping[str, str]) -> Iterator[Path]:
    """A temporary folder that only this user may enter, with exactly these files {name: sha256}; it is gone afterwards.

    Raises:
        IntegrityError: a file is no longer what was checked.
    """
    with tempfile.TemporaryDirectory(prefix="likeness-weights-") as place:
        for name, sha256 in files.items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise IntegrityError(f"{name} changed after it was checked: nothing was loaded; see who writes to this folder")
            (Path(place) / name).write_bytes(data)
        yield Path(place)
