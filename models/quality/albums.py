"""People of whom the truth is known, looked at as the stage `judge` looks at samples: what calibrations are measured on.

Each person's photos go through intake. Then they are dealt into FOLDS parts: with one part aside, the others are what a subject would have given, portraits and witnesses, and
the part aside stands for the samples of a perfect adapter. So every photo is unseen once. Crops have the side of the base's samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from likeness.errors import InputError
from likeness.intake.policy import IntakePolicy
from likeness.intake.sources import Folder
from likeness.records import FindingCode
from models.captions.slots import SlotReader
from models.faces import align
from models.faces.face import Face, Picture, Vectors
from models.faces.photos import inspect_photos
from models.faces.portraits import choose_witnesses
from models.faces.tools import FaceTools
from models.quality import findings, measure
from models.quality.looking import Looker
from models.quality.planting import CHECKERS, PLANTS
from models.quality.unsafe import UnsafeReader

FOLDS = 3
FEWEST = 9                # usable photos of a person: two parts are then portraits enough for any set
FEWEST_PEOPLE = 4
SPOILT = 6                # photos of each person, at most, that each defect is planted in
Tell = Callable[[int, int, str], None]      # done, total, what is being done


@dataclass(frozen=True)
class Album:
    """One person: aligned tight crops (P, S, S, 3) of all usable photos, and their vectors (P, D), to the second recogniser too where one votes."""

    name: str
    noun: str
    crops: NDArray[np.uint8]
    vectors: Vectors
    second: Vectors | None

    def folds(self, held_out: int) -> list[Fold]:
        """Each part set aside once; witnesses of the rest are chosen as the product chooses them."""
        every, found = range(len(self.crops)), []
        for aside in range(FOLDS):
            rest = [i for i in every if i % FOLDS != aside]
            witnesses = [rest[i] for i in choose_witnesses(self.vectors[rest], held_out)]
            found.append(Fold([i for i in rest if i not in witnesses], witnesses, [i for i in every if i % FOLDS == aside]))
        return found


@dataclass(frozen=True)
class Fold:
    """Which of a person's photos are trained on, held out, and unseen."""

    trained: list[int]
    witnesses: list[int]
    unseen: list[int]

    @property
    def own(self) -> list[int]:
        """All portraits of the subject."""
        return [*self.trained, *self.witnesses]


@dataclass(frozen=True)
class Spoilt:
    """What was found on one picture with one planted defect: how many faces, and which findings."""

    faces: int
    codes: frozenset[FindingCode]


@dataclass(frozen=True)
class Looked:
    """A person whose every photo was looked at in the fold in which it is unseen.

    Attributes:
        answers: what the reader of slots sees on each.
        spoilt: by planted defect, one entry for each of up to SPOILT photos.
    """

    album: Album
    folds: list[Fold]
    seen: list[measure.Seen]
    answers: list[dict[str, tuple[str, float]]]
    spoilt: Mapping[str, list[Spoilt]]


def read_albums(folder: Path, nouns: Mapping[str, str], *, faces: FaceTools, policy: IntakePolicy, side_px: int, tell: Tell) -> tuple[list[Album], int]:
    """(people, how many were left out for want of usable photos): a folder below `folder` for each person; who is not in `nouns` is a person.

    Raises:
        InputError: too few people are left.
    """
    places = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    albums = []
    for number, place in enumerate(places):
        tell(number, len(places), f"photos of {place.name}")
        found = inspect_photos(Folder(place, policy), tools=faces, policy=policy)
        if found.set.verdict != "ok" or len(found.accepted) < FEWEST:
            continue
        crops = np.stack([align.crop(p.pixels, align.fit(p.face.points), side_px=side_px) for p in found.accepted])
        albums.append(Album(place.name, nouns.get(place.name, "person"), crops, np.stack([p.embedding for p in found.accepted]),
                            None if faces.second is None else faces.second.embed_portraits(list(crops))))
    tell(len(places), len(places), f"{len(albums)} people can be used")
    if len(albums) < FEWEST_PEOPLE:
        raise InputError(f"{len(albums)} of {len(places)} folders hold {FEWEST} usable photos of one person, {FEWEST_PEOPLE} are needed: name a folder with --users that has a "
                         "folder of photos for each person")
    return albums, len(places) - len(albums)


def look(albums: Sequence[Album], *, faces: FaceTools, reader: SlotReader, safety: UnsafeReader, base: str, held_out: int, tell: Tell) -> list[Looked]:
    """Look at every photo once, and at up to SPOILT of each person with each defect that has a checker; `base` is the revision that limits are widened by."""
    found: list[Looked] = []
    borrowed: tuple[Picture, Face] | None = None                 # what a second face and a collage are made with: another person's
    for number, album in enumerate([albums[-1], *albums]):       # the last one first, only to lend
        tell(number, len(albums) + 1, f"pictures of {album.name}")
        at = [faces.find_faces(crop) for crop in album.crops]
        one = [i for i, f in enumerate(at) if len(f) == 1]
        if number and borrowed is not None:
            found.append(_look(album, at, one, borrowed, faces=faces, reader=reader, safety=safety, base=base, held_out=held_out))
        borrowed = (album.crops[one[0]], at[one[0]][0]) if one else borrowed
    tell(len(albums) + 1, len(albums) + 1, "looked at")
    return found


def _look(album: Album, at: Sequence[Sequence[Face]], one: Sequence[int], borrowed: tuple[Picture, Face], *, faces: FaceTools, reader: SlotReader, safety: UnsafeReader, base: str,
          held_out: int) -> Looked:
    folds = album.folds(held_out)
    seen: list[measure.Seen | None] = [None] * len(album.crops)
    spoilt: dict[str, list[Spoilt]] = {plant: [] for plant in CHECKERS}
    chosen = one[:: max(1, -(-len(one) // SPOILT))]
    for fold in folds:
        usual = findings.usual([album.crops[i] for i in fold.own], base=base)
        looker = Looker(faces, reader, usual, safety)
        for i in fold.unseen:
            seen[i] = looker.see(album.crops[i], name=hashlib.sha256(album.crops[i].tobytes()).hexdigest(), category="plain", slots={})
            for plant in spoilt if i in chosen else ():
                picture = PLANTS[plant](album.crops[i], at[i][0], *borrowed, np.random.default_rng([list(PLANTS).index(plant), i, *album.name.encode()]))
                there = faces.find_faces(picture)
                spoilt[plant].append(Spoilt(len(there), frozenset(f.code for f in findings.find_defects(picture, there, usual))))
    return Looked(album, folds, [s for s in seen if s is not None], reader.read(album.crops), spoilt)
