"""Intake: every photo of a source judged, and the set as a whole. One bad photo never stops the good ones."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from likeness.errors import InputError
from likeness.intake.decode import Decoded, Decoder
from likeness.intake.policy import IntakePolicy
from likeness.intake.reasons import Refusal
from likeness.records import PhotoJudgement, SetJudgement
from models.faces import align
from models.faces.tools import Face, FaceTools

LITTER = {"thumbs.db", "desktop.ini", ".ds_store"}
NO_PHOTOS = {".txt", ".json", ".xml", ".xmp", ".aae", ".md", ".csv", ".ini", ".db", ".log"}


@dataclass(frozen=True)
class AcceptedPhoto:
    """A photo that is used: upright sRGB pixels (H, W, 3), its main face, what was measured on it."""

    name: str
    source_sha256: str
    pixels: NDArray[np.uint8]
    changes: tuple[str, ...]
    face: Face
    embedding: NDArray[np.float32]
    sharpness: float
    shape_hash: Any
    sidecar: str | None


@dataclass
class Inspection:
    """Every file with its verdict, the set's verdict, and the photos that are used."""

    judgements: list[PhotoJudgement] = field(default_factory=list)
    set: SetJudgement = SetJudgement(verdict="reject", reason="no_usable_photo", message="no photo was looked at")
    accepted: list[AcceptedPhoto] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The document of `likeness inspect --json`."""
        return {"photos": [j.plain() for j in self.judgements], "set": self.set.plain()}


def walk(source: Path) -> Iterator[tuple[str, str]]:
    """(printable name, path) of everything below a folder that is not a folder, in a stable order; links are named, never followed."""
    if not source.is_dir():
        raise InputError("the source of photos is not a folder: name a folder that holds photos of one person")
    for folder, folders, files in os.walk(source, followlinks=False):
        folders.sort()
        links = [f for f in folders if os.path.islink(os.path.join(folder, f))]
        for name in sorted([*files, *links]):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, source).replace(os.sep, "/")
            yield os.fsencode(relative).decode("utf-8", "backslashreplace"), path


def read_file(path: str, policy: IntakePolicy) -> bytes | Refusal:
    """The bytes of a regular file within the size limit, opened so that neither a link nor a pipe can catch us."""
    try:
        before = os.lstat(path)
        if not stat.S_ISREG(before.st_mode):
            return Refusal("not_a_regular_file", "this is no ordinary file: copy the photo itself into the folder")
        if before.st_size > policy.max_file_bytes:
            return Refusal("too_large_bytes", f"{before.st_size / 1e6:.0f} MB, at most {policy.max_file_bytes / 1e6:.0f} MB are read: export the photo as JPEG")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return Refusal("not_a_regular_file", "this is no ordinary file: copy the photo itself into the folder")
            data = file.read(policy.max_file_bytes + 1)
    except OSError:
        return Refusal("unreadable", "the file may not be read: check its permissions")
    if len(data) > policy.max_file_bytes:
        return Refusal("too_large_bytes", f"more than {policy.max_file_bytes / 1e6:.0f} MB: export the photo as JPEG")
    return data


def inspect_photos(source: Path, *, tools: FaceTools, policy: IntakePolicy, progress: Callable[[int, int], None] | None = None) -> Inspection:
    """Judge every file below `source`, then the set.

    Raises:
        InputError: if `source` is no folder.
    """
    files = list(walk(source))
    verdicts: dict[str, PhotoJudgement] = {}
    candidates: list[AcceptedPhoto] = []
    seen: dict[str, str] = {}
    with Decoder(policy) as decoder:
        for number, (name, path) in enumerate(files):
            if number >= policy.max_photos:
                found: AcceptedPhoto | Refusal | None = Refusal("too_many_files", f"only the first {policy.max_photos} files are looked at")
            else:
                found = _judge_file(name, path, decoder, tools, policy, seen)
            if isinstance(found, AcceptedPhoto):
                candidates.append(found)
            else:
                verdicts[name] = (_refused(name, found) if found is not None else
                                  PhotoJudgement(name=name, verdict="ignore", reason="not_a_photo", message="not a photo: not counted"))
            if progress is not None:
                progress(number + 1, len(files))
    candidates, copies = _without_near_duplicates(candidates, tools, policy)
    kept, strangers, judged = _one_person(candidates, len(copies), tools, policy)
    for photo, refusal in [*copies, *strangers]:
        verdicts[photo.name] = _refused(photo.name, refusal)
    for photo in kept:
        verdicts[photo.name] = PhotoJudgement(name=photo.name, verdict="normalise" if photo.changes else "accept", reason=None,
                                              message=f"used after conversion: {', '.join(photo.changes)}" if photo.changes else "used as it is")
    return Inspection([verdicts[name] for name, _ in files], judged, kept)


def _refused(name: str, refusal: Refusal) -> PhotoJudgement:
    return PhotoJudgement(name=name, verdict="reject", reason=refusal.reason, message=refusal.message)


def _judge_file(name: str, path: str, decoder: Decoder, tools: FaceTools, policy: IntakePolicy, seen: dict[str, str]) -> AcceptedPhoto | Refusal | None:
    base = name.rsplit("/", 1)[-1].lower()
    if base in LITTER or base.startswith("._") or "__macosx/" in name.lower() or os.path.splitext(base)[1] in NO_PHOTOS:
        return None
    data = read_file(path, policy)
    if isinstance(data, Refusal):
        return data
    if not data:
        return Refusal("empty_file", "the file is empty: copy or download it again")
    sha = hashlib.sha256(data).hexdigest()
    if sha in seen:
        return Refusal("duplicate", f"the same file as {seen[sha]}")
    seen[sha] = name
    decoded = decoder.decode(data)
    if isinstance(decoded, Refusal):
        return decoded
    return _judge_face(name, path, sha, decoded, tools, policy)


def _judge_face(name: str, path: str, sha: str, decoded: Decoded, tools: FaceTools, policy: IntakePolicy) -> AcceptedPhoto | Refusal:
    pixels = decoded.pixels
    if min(decoded.declared_px) < policy.min_side_px:
        return Refusal("too_small", f"{decoded.declared_px[0]} x {decoded.declared_px[1]} px, the short side needs {policy.min_side_px}: use the original")
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    faces = tools.find_faces(pixels)
    if not faces:
        if luma.mean() < policy.min_luma:
            return Refusal("too_dark", "the photo is too dark to see a face: use one with more light")
        if luma.mean() > policy.max_luma:
            return Refusal("too_bright", "the photo is washed out: use one with less light")
        if luma.std() < policy.min_contrast:
            return Refusal("low_contrast", "nothing stands out in this photo: use a clearer one")
        return Refusal("no_face", "no face was found: use a photo in which the face is large, sharp and seen from the front or half from the side")
    if len(faces) > 1 and faces[0].height_px < policy.dominant_face * faces[1].height_px:
        return Refusal("several_faces", f"{len(faces)} faces of similar size: crop the photo to one person")
    face = faces[0]
    if face.height_px < policy.min_face_px:
        return Refusal("face_too_small", f"the face is {face.height_px:.0f} px high, {policy.min_face_px:.0f} are needed: use a closer photo")
    crop = align.crop(pixels, align.fit(face.points), side_px=256)
    sharpness = tools.sharpness(crop)
    inner = cv2.cvtColor(crop[70:190, 70:186], cv2.COLOR_RGB2GRAY)
    if inner.mean() < policy.min_luma:
        return Refusal("too_dark", "the face is too dark: use a photo with more light on it")
    if inner.mean() > policy.max_luma:
        return Refusal("too_bright", "the face is washed out: use a photo with less light on it")
    if inner.std() < policy.min_contrast:
        return Refusal("low_contrast", "the face hardly stands out: use a clearer photo")
    if sharpness < policy.min_sharpness:
        return Refusal("too_blurry", f"the face is blurred (sharpness {sharpness:.0f}, {policy.min_sharpness:.0f} needed): use a sharper photo")
    words = Path(path).with_suffix(".txt")
    text = read_file(str(words), policy) if words.is_file() else None
    sidecar = text.decode("utf-8", "replace").strip()[:2000] if isinstance(text, bytes) and text.strip() else None
    return AcceptedPhoto(name, sha, pixels, decoded.changes, face, tools.embed_faces(pixels, [face])[0], sharpness,
                         imagehash.phash(Image.fromarray(pixels)), sidecar)


def _without_near_duplicates(photos: list[AcceptedPhoto], tools: FaceTools, policy: IntakePolicy) -> tuple[list[AcceptedPhoto], list[tuple[AcceptedPhoto, Refusal]]]:
    """Keep the sharpest of each group of look-alikes: alike as a picture, and the same face in it."""
    kept: list[AcceptedPhoto] = []
    copies = []
    for photo in sorted(photos, key=lambda p: (-p.pixels.shape[0] * p.pixels.shape[1], -p.sharpness, p.name)):
        twin = next((k for k in kept if k.shape_hash - photo.shape_hash <= policy.near_duplicate_bits
                     and np.linalg.norm(k.embedding - photo.embedding) < policy.near_duplicate_distance * tools.same_person_distance), None)
        if twin is None:
            kept.append(photo)
        else:
            copies.append((photo, Refusal("near_duplicate", f"nearly the same picture as {twin.name}, which is larger or sharper")))
    return sorted(kept, key=lambda p: p.name), copies


def _one_person(photos: list[AcceptedPhoto], copies: int, tools: FaceTools,
                policy: IntakePolicy) -> tuple[list[AcceptedPhoto], list[tuple[AcceptedPhoto, Refusal]], SetJudgement]:
    """Find the person on most photos; the others are strangers."""
    if not photos:
        return [], [], SetJudgement(verdict="reject", reason="no_usable_photo", message="not one photo can be used: see why beside each")
    vectors = np.stack([p.embedding for p in photos])
    limit = policy.stranger_distance * tools.same_person_distance
    near = np.linalg.norm(vectors[:, None] - vectors[None], axis=2) <= limit
    core = near[int(near.sum(1).argmax())]
    centre = vectors[core].mean(0)
    mine = np.linalg.norm(vectors - centre, axis=1) <= limit
    if mine.mean() < policy.majority:
        return [], [(p, Refusal("identity_mismatch", "no person is on most of the photos")) for p in photos], SetJudgement(
            verdict="reject", reason="ambiguous_identity", message=f"the largest group of one person is {int(mine.sum())} of {len(photos)} photos: sort the photos by person")
    kept = [p for p, m in zip(photos, mine, strict=True) if m]
    strangers = [(p, Refusal("identity_mismatch", "this looks like somebody else than on the other photos")) for p, m in zip(photos, mine, strict=True) if not m]
    if len(kept) < policy.min_photos:
        reason = "too_few_distinct_photos" if len(kept) + copies >= policy.min_photos else "too_few_photos"
        return kept, strangers, SetJudgement(verdict="reject", reason=reason, message=f"{len(kept)} usable photos of one person, {policy.min_photos} are needed",
                                             advice=(f"add {policy.min_photos - len(kept)} more, taken at other times and places",))
    advice = () if len(kept) >= 8 else (f"{len(kept)} photos are enough to begin; eight or more, in different light and clothes, give a better likeness",)
    return kept, strangers, SetJudgement(verdict="ok", reason=None, message=f"{len(kept)} photos of one person", advice=advice)
