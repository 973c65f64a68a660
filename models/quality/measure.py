"""What the gate reads, measured on pictures: faces, identity, copies. The gate itself decides elsewhere (`likeness.gate`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from likeness import gate
from likeness.errors import IntegrityError
from likeness.records import BaseScores, Finding, Measurements, Recogniser, SampleScore

Vectors = NDArray[np.float32]
FALSE_ACCEPT_RATE = 0.01       # of the impostor bank, at the threshold that a subject's samples are held to
APPEARANCE_SIDE_PX = 32


class Face(Protocol):
    """A found face: only its presence and its embedding matter here."""

    @property
    def box_px(self) -> tuple[float, float, float, float]: ...


@dataclass(frozen=True)
class Seen:
    """One sample as the recogniser saw it: how many faces (None: it failed), and the embedding if there is exactly one."""

    image: str                   # digest
    category: str
    faces: int | None
    embedding: Vectors | None
    thumbnail: NDArray[np.float32]
    findings: tuple[Finding, ...] = ()
    slots_right: int = 0
    slots_asked: int = 0
    second: Vectors | None = None      # the embedding of the second recogniser, where one votes


@dataclass(frozen=True)
class Identity:
    """Whom one recogniser compares samples with. Distances are Euclidean, as dlib's recogniser means them.

    The reference is the centroid of the *witnesses*, portraits that training never saw.
    """

    backend: str
    bank: str
    witnesses: Vectors           # (W, D): held-out portraits
    own: Vectors                 # (P, D): all usable portraits
    impostors: Vectors           # (M, D): the bank

    @cached_property
    def centroid(self) -> Vectors:
        return np.asarray(self.witnesses.mean(0))

    @cached_property
    def recogniser(self) -> Recogniser:
        """Floor, ceiling, and the threshold: the distance below which FALSE_ACCEPT_RATE of the impostor bank falls.

        Raises:
            IntegrityError: the network gave something else than numbers for a witness or for the bank, so nobody can be told from strangers.
        """
        impostors, ceiling = np.linalg.norm(self.impostors - self.centroid, axis=1), leave_one_out(self.own)
        if not len(impostors) or not np.isfinite(impostors).all():
            raise IntegrityError(f"recogniser {self.backend!r} gave something else than numbers for the witnesses or for the impostor bank: check its weights (`likeness doctor`)")
        floor = float(np.median(impostors))
        return Recogniser(backend=self.backend, bank=self.bank, threshold=float(np.quantile(impostors, FALSE_ACCEPT_RATE)),
                          ceiling=ceiling if np.isfinite(ceiling) else floor, floor=floor)

    def place(self, seen: Seen, vector: Vectors | None) -> tuple[float | None, float | None]:
        """(distance, position) of a sample; None where it has not exactly one face, or its embedding failed, which never passes."""
        if seen.faces != 1 or vector is None or not np.isfinite(vector).all():
            return None, None
        distance = float(np.linalg.norm(vector - self.centroid))
        ceiling = leave_one_out(self.own)
        return distance, gate.position(distance, floor=self.recogniser.floor, ceiling=ceiling)


@dataclass(frozen=True)
class References:
    """What the samples of one subject are held against."""

    identity: Identity
    training: NDArray[np.float32]      # (N, 32, 32, 3): thumbnails of the training crops
    base: BaseScores | None = None     # what the base alone draws on the same battery
    second: Identity | None = None     # as a second recogniser sees the same people


def thumbnail(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A picture as (32, 32, 3) in [0, 1]: what two pictures must share to be copies."""
    small = cv2.resize(image_HWC, (APPEARANCE_SIDE_PX, APPEARANCE_SIDE_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / np.float32(255)


def appearance_distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Root mean squared difference of two thumbnails: 0 for the same picture."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def nearest(a: NDArray[np.float32], training: Iterable[NDArray[np.float32]]) -> float | None:
    """Appearance distance of a thumbnail to the nearest training picture, mirrored or not: a mirrored copy is a copy. None without training pictures."""
    return min((appearance_distance(a, view) for t in training for view in (t, t[:, ::-1])), default=None)


def slots_seen(asked: Mapping[str, str], seen: Mapping[str, tuple[str, float]]) -> tuple[int, int]:
    """(right, asked): how many of the slots that a prompt asks for a reader saw in the picture; a slot it does not know is not seen.

    Raises:
        IntegrityError: the reader's belief in a value is no number. Its answer would be the first value of the slot, by chance the right one; and a base that such a reader
            looked at would seem to follow nothing, so that nothing would be asked of anybody.
    """
    deaf = sorted(slot for slot in asked if slot in seen and not np.isfinite(seen[slot][1]))
    if deaf:
        raise IntegrityError(f"the network that reads pictures gave no number for {', '.join(deaf)}: its weights are damaged, install Likeness again")
    return sum(slot in seen and seen[slot][0] == value for slot, value in asked.items()), len(asked)


def diversity(thumbnails: Sequence[NDArray[np.float32]]) -> float | None:
    """Mean appearance distance over all pairs of pictures: 0 if all are the same; None below two."""
    pairs = [appearance_distance(a, b) for i, a in enumerate(thumbnails) for b in thumbnails[:i]]
    return float(np.mean(pairs)) if pairs else None


def distances(thumbnails: Sequence[NDArray[np.float32]]) -> tuple[tuple[float, ...], ...]:
    """Row i: appearance distance of picture i to each before it, to four digits, so that no machine's last bits decide what is delivered."""
    return tuple(tuple(round(appearance_distance(a, b), 4) for b in thumbnails[:i]) for i, a in enumerate(thumbnails))


def leave_one_out(own: Vectors) -> float:
    """Median distance of each portrait to the centroid of the others: how near this person is to themselves. NaN below two portraits."""
    if len(own) < 2:
        return float("nan")
    total = own.sum(0)
    return float(np.median([np.linalg.norm(v - (total - v) / (len(own) - 1)) for v in own]))


def measure(samples: Sequence[Seen], references: References, *, bare: Sequence[Seen] = ()) -> Measurements:
    """Turn what was seen into the gate's numbers; `bare` are samples of the class noun alone."""
    first = references.identity.recogniser
    return Measurements(
        backend=first.backend, bank=first.bank, threshold=first.threshold, ceiling=first.ceiling, floor=first.floor, usable_portraits=len(references.identity.own),
        diversity=diversity([s.thumbnail for s in samples if s.category != gate.STYLISED]), scores=tuple(_score(s, references) for s in samples),
        apart=distances([s.thumbnail for s in samples]), bare=tuple(_score(s, references) for s in bare), base=references.base,
        second=None if references.second is None else references.second.recogniser)


def with_more(measured: Measurements, thumbnails: Sequence[NDArray[np.float32]], more: Sequence[Seen], references: References) -> Measurements:
    """The same numbers, and those of samples drawn besides, for delivery only.

    Args:
        measured: of the samples that decide.
        thumbnails: (N, 32, 32, 3), theirs, in order.
        more: what was drawn besides, as it was seen.
        references: those of `measured`.
    """
    apart = distances([*thumbnails, *(s.thumbnail for s in more)])
    return Measurements.model_validate({**dict(measured), "apart": (*measured.apart, *apart[len(thumbnails):]), "more": tuple(_score(s, references) for s in more)})


def _score(seen: Seen, references: References) -> SampleScore:
    distance, position = references.identity.place(seen, seen.embedding)
    second = (None, None) if references.second is None else references.second.place(seen, seen.second)
    return SampleScore(image=seen.image, category=seen.category, faces=seen.faces, identity_distance=distance, position=position,
                       nearest_training=nearest(seen.thumbnail, references.training),
                       findings=seen.findings, slots_right=seen.slots_right, slots_asked=seen.slots_asked, second_distance=second[0], second_position=second[1])
