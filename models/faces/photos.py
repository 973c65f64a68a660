"""Intake: every photo of a source judged, and the set as a whole. One bad photo never stops the good ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from likeness.intake.decode import Decoded, Decoder
from likeness.intake.policy import IntakePolicy
from likeness.intake.reasons import Refusal
from likeness.intake.sets import Look, advise, find_person, judge_set
from likeness.intake.sources import Entry, Source, sidecars
from likeness.records import PhotoJudgement, SetJudgement
from models.faces import align
from models.faces.face import Face
from models.faces.tools import FaceTools

LITTER = {"thumbs.db", "desktop.ini", ".ds_store"}
NO_PHOTOS = {".txt", ".json", ".xml", ".xmp", ".aae", ".md", ".csv", ".ini", ".db", ".log"}
PREVIEW_PX = 240
READ_PX = 128                  # of crops that a reader of slots looks at
HASH_PX = (32, 32)             # of a perceptual hash: imagehash reduces to this itself


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
    shape_hash: Any                # perceptual hash of the picture, and of its mirror image
    mirror_hash: Any
    look: NDArray[np.float64]      # (64, 64) grey of the aligned face, zero mean, unit length
    luma: float                    # mean of the face, 0..255
    colourful: bool
    sidecar: str | None


@dataclass(frozen=True)
class Inspection:
    """Every file with its verdict, the set's verdict, and the photos that are used."""

    judgements: list[PhotoJudgement]
    set: SetJudgement
    accepted: list[AcceptedPhoto]
    previews: dict[str, NDArray[np.uint8]]      # by name: every picture that could be decoded, small, with a box about each face

    def as_json(self) -> dict[str, Any]:
        """The document of `likeness inspect --json`."""
        return {"photos": [j.plain() for j in self.judgements], "set": self.set.plain()}


class Reader(Protocol):
    """Says what aligned portraits show, slot by slot (`models.captions.slots.SlotReader`)."""

    def sure(self, crops_NSSC: NDArray[np.uint8], /) -> list[dict[str, str]]:
        """For each crop, the slots it is sure of."""


def inspect_photos(source: Source, *, tools: FaceTools, policy: IntakePolicy, reader: Reader | None = None,
                   progress: Callable[[int, int], None] | None = None) -> Inspection:
    """Judge every file of `source`, then the set.

    Args:
        reader: without one, advice says nothing about clothes, glasses, hats, expressions and places.

    Raises:
        InputError: if `source` cannot be read as a whole.
    """
    entries = source.entries()
    words = sidecars(entries)
    verdicts: dict[str, PhotoJudgement] = {}
    candidates: list[AcceptedPhoto] = []
    with Decoder(policy) as decoder:
        desk = _Desk(decoder, tools, policy)
        for number, entry in enumerate(entries):
            if number >= policy.max_photos:
                found: AcceptedPhoto | Refusal | None = Refusal("too_many_files", f"only the first {policy.max_photos} files are looked at")
            else:
                found = desk.judge(entry, words.get(entry.name))
            if isinstance(found, AcceptedPhoto):
                candidates.append(found)
            else:
                verdicts[entry.name] = (_refused(entry.name, found) if found is not None else
                                        PhotoJudgement(name=entry.name, verdict="ignore", reason="not_a_photo", message="not a photo: not counted"))
            if progress is not None:
                progress(number + 1, len(entries))
    kept, judged = _judge_people(candidates, verdicts, tools, policy, reader)
    return Inspection([verdicts[e.name] for e in entries], judged, kept, desk.previews)


def _judge_people(candidates: list[AcceptedPhoto], verdicts: dict[str, PhotoJudgement], tools: FaceTools, policy: IntakePolicy,
                  reader: Reader | None) -> tuple[list[AcceptedPhoto], SetJudgement]:
    """Add the verdicts that need the whole set; give the photos that are used."""
    copies = _find_copies(candidates, tools, policy)
    shots = {p.name: n for n, p in enumerate(p for p in candidates if p.name not in copies)}
    shots.update({name: shots[twin.name] for name, twin in copies.items()})
    limit = policy.stranger_distance * tools.same_person_distance
    people = find_person(np.stack([p.embedding for p in candidates]), [shots[p.name] for p in candidates], limit=limit,
                         majority=policy.majority) if candidates else None
    mine = people.mine.tolist() if people is not None else []
    kept, strangers, repeats = [], 0, sum(v.reason == "duplicate" for v in verdicts.values())
    for photo, own in zip(candidates, mine, strict=True):
        if not own:
            strangers += 1
            verdicts[photo.name] = _refused(photo.name, Refusal("identity_mismatch", "this looks like somebody else than on most photos: take it out"))
        elif photo.name in copies:
            repeats += 1
            verdicts[photo.name] = _refused(photo.name, Refusal("near_duplicate", f"the same shot as {copies[photo.name].name}, which is larger or sharper"))
        else:
            kept.append(photo)
            verdicts[photo.name] = PhotoJudgement(name=photo.name, verdict="normalise" if photo.changes else "accept", reason=None,
                                                  message=f"used after conversion: {', '.join(photo.changes)}" if photo.changes else "used as it is")
    judged = judge_set(distinct=len(kept), copies=repeats, strangers=strangers, people=people, policy=policy, advice=advise(_looks(kept, reader)))
    return kept, judged


def _refused(name: str, refusal: Refusal) -> PhotoJudgement:
    return PhotoJudgement(name=name, verdict="ignore" if refusal.ignored else "reject", reason=refusal.reason, message=refusal.message)


@dataclass
class _Desk:
    """Where the files of one source are judged, one by one."""

    decoder: Decoder
    tools: FaceTools
    policy: IntakePolicy
    seen: dict[str, str] = field(default_factory=dict)                        # sha256 -> name
    previews: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def judge(self, entry: Entry, words: Entry | None) -> AcceptedPhoto | Refusal | None:
        """One file; None for what was never meant as a photo."""
        base = entry.name.rsplit("/", 1)[-1].lower()
        if base in LITTER or base.startswith("._") or "__macosx/" in entry.name.lower() or os.path.splitext(base)[1] in NO_PHOTOS:
            return None
        data = entry.read()
        if isinstance(data, Refusal):
            return data
        if not data:
            return Refusal("empty_file", "the file is empty: copy or download it again")
        sha = hashlib.sha256(data).hexdigest()
        if sha in self.seen:
            return Refusal("duplicate", f"the same file as {self.seen[sha]}")
        self.seen[sha] = entry.name
        decoded = self.decoder.decode(data)
        if isinstance(decoded, Refusal):
            return decoded
        return self._judge_face(entry.name, words, sha, decoded)

    def _judge_face(self, name: str, words: Entry | None, sha: str, decoded: Decoded) -> AcceptedPhoto | Refusal:
        pixels, tools, policy = decoded.pixels, self.tools, self.policy
        self.previews[name] = _preview(pixels, [])
        if min(decoded.declared_px) < policy.min_side_px:
            return Refusal("too_small", f"{decoded.declared_px[0]} x {decoded.declared_px[1]} px, the short side needs {policy.min_side_px}: use the original")
        luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        faces = tools.find_faces(pixels)
        self.previews[name] = _preview(pixels, faces)
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
        inside = align.face_inside_share(pixels.shape, align.fit(face.points))
        if inside < policy.min_face_inside:
            return Refusal("face_cut_off", f"{1 - inside:.0%} of the face lies outside the photo: use one that shows all of it")
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
        clarity = tools.clarity.read(crop)
        if clarity.drawn > tools.clarity.limits.drawn:
            return Refusal("not_a_photograph", "this is a drawing or a filtered picture: use a photo as the camera took it")
        if clarity.covered > tools.clarity.limits.covered:
            return Refusal("face_occluded", "something covers the face, or it was made unrecognisable: use a photo that shows all of it")
        text = words.read() if words is not None else None
        sidecar = text.decode("utf-8", "replace").strip()[:2000] if isinstance(text, bytes) and text.strip() else None
        grey = cv2.cvtColor(align.crop(pixels, align.fit(face.points), side_px=64), cv2.COLOR_RGB2GRAY).astype(np.float64)
        grey -= grey.mean()
        small = Image.fromarray(luma).resize(HASH_PX, Image.Resampling.LANCZOS)      # what phash would do, once instead of for each side
        return AcceptedPhoto(name, sha, pixels, decoded.changes, face, tools.embed_faces(pixels, [face])[0], sharpness,
                             imagehash.phash(small), imagehash.phash(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), grey / max(float(np.linalg.norm(grey)), 1e-9),
                             float(inner.mean()), bool(np.ptp(crop.astype(np.int16), axis=2).mean() > 4), sidecar)


def _preview(pixels: NDArray[np.uint8], faces: list[Face]) -> NDArray[np.uint8]:
    """A small copy with a box about each face: the one that counts is bright."""
    scale = PREVIEW_PX / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    small = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    for number, face in reversed(list(enumerate(faces))):
        left, top, right, bottom = (round(v * scale) for v in face.box_px)
        cv2.rectangle(small, (left, top), (right, bottom), (150, 150, 150) if number else (90, 230, 140), 1)
    return small


def _find_copies(photos: list[AcceptedPhoto], tools: FaceTools, policy: IntakePolicy) -> dict[str, AcceptedPhoto]:
    """For each photo that repeats another shot, the one that is kept: the largest, then the sharpest."""
    kept: list[AcceptedPhoto] = []
    copies: dict[str, AcceptedPhoto] = {}
    for photo in sorted(photos, key=lambda p: (-p.pixels.shape[0] * p.pixels.shape[1], -p.sharpness, p.name)):
        twin = next((k for k in kept if _same_shot(k, photo, tools, policy)), None)
        if twin is None:
            kept.append(photo)
        else:
            copies[photo.name] = twin
    return copies


def _same_shot(a: AcceptedPhoto, b: AcceptedPhoto, tools: FaceTools, policy: IntakePolicy) -> bool:
    """Alike as a picture, or as an aligned face (which a crop leaves alone), mirrored or not; and never two people."""
    if np.linalg.norm(a.embedding - b.embedding) > policy.near_duplicate_distance * tools.same_person_distance:
        return False
    if any(a.shape_hash - h <= policy.near_duplicate_bits for h in (b.shape_hash, b.mirror_hash)):
        return True
    return bool(max((a.look * b.look).sum(), (a.look * b.look[:, ::-1]).sum()) >= policy.near_duplicate_likeness)


def _looks(photos: list[AcceptedPhoto], reader: Reader | None) -> list[Look]:
    """What each photo adds to the set."""
    if reader is None or not photos:
        return [_look(photo, {}) for photo in photos]
    shown = reader.sure(np.stack([align.crop(p.pixels, align.fit(p.face.points), side_px=READ_PX) for p in photos]))
    return [_look(photo, shows) for photo, shows in zip(photos, shown, strict=True)]


def _look(photo: AcceptedPhoto, shows: dict[str, str]) -> Look:
    face = align.fit(photo.face.points)
    eyes, nose = photo.face.points[:4].mean(0), photo.face.points[4]
    along = np.array([np.cos(np.radians(face.roll_deg)), np.sin(np.radians(face.roll_deg))])
    return Look(turn=float((nose - eyes) @ along / face.eye_distance_px), face_rel=photo.face.height_px / photo.pixels.shape[0],
                luma=photo.luma, colourful=photo.colourful, shows=shows)
