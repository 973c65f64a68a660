"""What ships beside the maquette's weights, made by `python -m models.maquette.companions`: class pictures for prior preservation (drawn by
the maquette itself), its own scores on the battery, and the bank of impostors (rendered people that nobody personalises, with their face
embeddings).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from likeness import digest
from likeness.errors import IntegrityError, UnknownBase
from likeness.records import BaseScores
from likeness.settings import Sampling
from models.faces.face import Vectors
from models.faces.tools import FaceTools
from models.maquette.vocabulary import NOUNS, training_caption

HERE = Path(__file__).parent
CLASS_FOLDER, BANK_FOLDER = HERE / "class_pictures", HERE / "bank"
CLASS_COUNT = 48              # per sex: one per step of batch 4 is then seen about eight times in 200 steps
BANK_SIZE = 200
BANK_EPOCH = 1                # raise it when a bank made from the same pictures by the same networks may differ
SCORES_FILE = HERE / "base_scores.json"


@dataclass(frozen=True)
class Bank:
    """Impostors: one embedding per rendered identity, and the digest that a Verdict names."""

    backend: str
    digest: str
    embeddings: NDArray[np.float32]      # (200, D)


@cache
def read_bank() -> Bank:
    """The shipped bank of impostors, as the default detector and recogniser see it.

    Raises:
        IntegrityError: the file is not what was shipped.
    """
    data = (BANK_FOLDER / "dlib.safetensors").read_bytes()
    vectors = load_arrays(data)["embeddings"]
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise IntegrityError("the impostor bank holds something else than embeddings: install Likeness again")
    return Bank("dlib", hashlib.sha256(data).hexdigest(), vectors)


def bank_for(tools: FaceTools, *, cache: Path | None = None) -> Bank:
    """The bank as these networks see it: shipped for the default; for any other made from the shipped pictures, once per `cache` folder.

    Its digest is `bank_digest`.
    """
    if tools.recogniser_name == "dlib":
        return read_bank()
    pictures, name = _bank_pictures(), bank_digest(tools)
    kept = cache / f"{name}.safetensors" if cache is not None else None
    vectors = _kept_bank(kept, len(pictures)) if kept is not None else None
    if vectors is None:
        vectors = np.stack([_embed_rendered(tools, data) for data in pictures])
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
            part.write_bytes(save_arrays({"embeddings": vectors}))
            part.replace(kept)
    return Bank(tools.recogniser_name, name, vectors)


def bank_digest(tools: FaceTools) -> str:
    """What a bank that is made is made from: networks with their weights, and pictures. Not its floats, whose last bits differ from machine to machine."""
    return digest.of_json({"epoch": BANK_EPOCH, "recogniser": tools.recogniser_name, "pictures": [digest.of_bytes(data) for data in _bank_pictures()]})


def _bank_pictures() -> list[bytes]:
    return [(BANK_FOLDER / person["file"]).read_bytes() for person in json.loads((BANK_FOLDER / "people.json").read_text())]


def _kept_bank(path: Path, people: int) -> NDArray[np.float32] | None:
    """The embeddings in a file that `bank_for` kept; None if there is none, or it is damaged: then it is made again."""
    try:
        vectors = np.asarray(load_arrays(path.read_bytes())["embeddings"], np.float32)
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == people and np.isfinite(vectors).all() else None


def _embed_rendered(tools: FaceTools, data: bytes) -> Vectors:
    """The identity vector of one picture of the bank."""
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
        crop = np.asarray(picture.convert("RGB"))
    return np.asarray(tools.embed_portraits([crop])[0], np.float32)


def read_class_pictures(noun: str, *, side_px: int) -> tuple[NDArray[np.uint8], list[str]]:
    """(pictures (M, side, side, 3), captions) of a class noun; "person" is women and men in turn.

    Raises:
        UnknownBase: no class pictures were made for this noun.
    """
    entries = json.loads((CLASS_FOLDER / "captions.json").read_text())
    chosen = [e for e in entries if noun == "person" or e["noun"] == noun]
    if not chosen:
        raise UnknownBase(f"no class pictures of {noun!r} ship with the maquette: there are some of man, woman and person")
    pictures = []
    for entry in chosen:
        with Image.open(CLASS_FOLDER / entry["file"], formats=["WEBP"]) as picture:
            array = np.asarray(picture.convert("RGB"))
        pictures.append(array if array.shape[0] == side_px else np.asarray(cv2.resize(array, (side_px, side_px), interpolation=cv2.INTER_CUBIC), np.uint8))
    words = [e["caption"].replace(f" {e['noun']} ", f" {noun} ") if noun == "person" else e["caption"] for e in chosen]
    return np.stack(pictures), words


def read_base_scores(noun: str, *, revision: str, battery: str, sampling: Sampling | None = None) -> BaseScores | None:
    """The shipped scores of the maquette alone, if they are of this revision, battery (digest), class noun and, where it is given, way of sampling."""
    every = [BaseScores.model_validate_json(json.dumps(s)) for s in json.loads(SCORES_FILE.read_text())]
    return next((s for s in every if (s.noun, s.revision, s.battery) == (noun, revision, battery)
                 and (sampling is None or (s.steps, s.guidance) == (sampling.steps, sampling.guidance))), None)


def make_base_scores() -> None:
    """Draw the default battery with the maquette alone, for each class noun, and measure what is drawn."""
    from likeness.settings import load_settings
    from models.captions.slots import SlotReader
    from models.diffusion import bases
    from models.faces.tools import dlib_tools
    from models.quality.base import measure_base

    base, faces, reader, settings = bases.load("maquette"), dlib_tools(), SlotReader.load(HERE / "weights" / "clip"), load_settings()
    scores = [measure_base(base, faces, reader, settings.battery, settings.sampling, noun) for noun in (*NOUNS.values(), "person")]
    SCORES_FILE.write_text(json.dumps([s.plain() for s in scores], indent=1) + "\n")


def make_class_pictures(rows: Sequence[dict[str, str]]) -> None:
    """Draw class pictures with the maquette, from captions of the training rows, evenly over women and men."""
    from models.diffusion import bases
    from models.diffusion.sampler import sample

    base = bases.load("maquette")
    CLASS_FOLDER.mkdir(exist_ok=True)
    rng = random.Random(20)
    entries = []
    for sex, noun in NOUNS.items():
        own = [r for r in rows if r["sex"] == sex and r["style"] == "photo"]
        captions: list[str] = []
        while len(captions) < CLASS_COUNT:
            words = training_caption(rng.choice(own), rng)
            if f" {noun} " in words + " " and " zq" not in words:
                captions.append(words)
        images = sample(base, captions, [1000 + i for i in range(CLASS_COUNT)])
        for i, (words, image) in enumerate(zip(captions, images, strict=True)):
            name = f"{noun}-{i:02d}.webp"
            (CLASS_FOLDER / name).write_bytes(_webp(image))
            entries.append({"file": name, "noun": noun, "caption": words})
    (CLASS_FOLDER / "captions.json").write_text(json.dumps(entries, indent=1) + "\n")


def make_bank(crops: NDArray[np.uint8], rows: Sequence[dict[str, str]]) -> None:
    """Choose 200 rendered identities, one plain photo of each, evenly over women and men, and embed them."""
    from models.faces.tools import dlib_tools

    tools = dlib_tools()
    BANK_FOLDER.mkdir(exist_ok=True)
    plain = [i for i, r in enumerate(rows) if r["style"] == "photo" and r["view"] == "frontal" and r["eyewear"] != "sunglasses" and r["light"] not in ("neon", "dim")]
    random.Random(21).shuffle(plain)
    taken: dict[str, str] = {}
    vectors, chosen = [], []
    for i in plain:
        row = rows[i]
        sexes = list(taken.values())
        if row["identity"] in taken or sexes.count(row["sex"]) >= BANK_SIZE // 2:
            continue
        faces = tools.find_faces(crops[i])
        if len(faces) != 1:
            continue
        taken[row["identity"]] = row["sex"]
        vectors.append(tools.embed_faces(crops[i], faces)[0])
        name = f"{row['identity']}.webp"
        (BANK_FOLDER / name).write_bytes(_webp(np.asarray(crops[i])))
        chosen.append({"file": name, "sex": row["sex"], "skin_luminance": row["skin_luminance"]})
        if len(taken) == BANK_SIZE:
            break
    (BANK_FOLDER / "dlib.safetensors").write_bytes(save_arrays({"embeddings": np.stack(vectors)}))
    (BANK_FOLDER / "people.json").write_text(json.dumps(chosen, indent=1) + "\n")
    print(f"bank: {len(chosen)} identities")


def _webp(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=88, method=6)
    return buffer.getvalue()


def main() -> None:
    """Command line."""
    from models.maquette import data

    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("what", choices=["classes", "scores", "bank"], nargs="+")
    p.add_argument("--work", type=Path, help="work folder of pretrain: its crops are read; scores need none")
    a = p.parse_args()
    if "scores" in a.what:
        make_base_scores()
    if a.what == ["scores"]:
        return
    if a.work is None:
        p.error("classes and bank need --work")
    crops, rows = data.load(a.work / "data")
    if "bank" in a.what:
        make_bank(crops, rows)
    if "classes" in a.what:
        make_class_pictures(rows)


if __name__ == "__main__":
    main()
