"""The set as a whole: whose photos these are, whether they are enough, and what is missing. Pure: vectors and numbers in, judgement out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from likeness.intake.policy import IntakePolicy
from likeness.records import SetJudgement

CORE_REACH = 1.1        # two photos lie further from each other than each from their mean
ROUNDS = 5


@dataclass(frozen=True)
class People:
    """Who is on which photo."""

    mine: NDArray[np.bool_]      # (N,) True: the person on most photos
    majority: bool


def find_person(vectors: NDArray[np.float32], groups: Sequence[int], *, limit: float, majority: float) -> People:
    """The person on most photos, by distance to a robust centre.

    The centre starts at the photo with most others nearby and is the mean of those within `limit`; every photo is measured against the
    mean of the *others*, so that no photo vouches for itself. Shots count, not files: near-duplicates share a group and one vote; only
    where the shots are level do the files decide.

    Args:
        vectors: (N, D), Euclidean.
        groups: for each photo the number of its shot.
        limit: distance to the centre up to which a photo shows this person.
        majority: share of the shots that must be one person.
    """
    v = np.asarray(vectors, np.float64)
    near = np.linalg.norm(v[:, None] - v[None], axis=2) <= limit * CORE_REACH
    # a shot's weight is shared by its files, so that copies do not pull the centre
    shots = np.asarray(groups)
    weight = np.array([1.0 / (shots == g).sum() for g in shots])
    mine = near[int((near * weight).sum(1).argmax())]
    for _ in range(ROUNDS):
        total, mass = (v * (weight * mine)[:, None]).sum(0), float((weight * mine).sum())
        distance = np.empty(len(v))
        for i in range(len(v)):
            own = (shots == shots[i]) & mine
            others = mass - float(weight[own].sum())
            centre = (total - (v[own] * weight[own, None]).sum(0)) / others if others > 1e-9 else total / mass
            distance[i] = np.linalg.norm(v[i] - centre)
        after = distance <= limit
        if not after.any() or (after == mine).all():
            break
        mine = after
    shots_mine, shots_all = len(set(shots[mine].tolist())), len(set(shots.tolist()))
    share = shots_mine / shots_all
    if 2 * shots_mine == shots_all:
        share = float(mine.mean())
    return People(mine, share >= majority)


def judge_set(*, distinct: int, copies: int, strangers: int, people: People | None, policy: IntakePolicy, advice: Sequence[str] = ()) -> SetJudgement:
    """The verdict on the set.

    Args:
        distinct: usable shots of the person.
        copies: usable files of the person that are exact or near duplicates of another.
        strangers: photos of somebody else.
        people: None if not one photo shows a usable face.
    """
    if people is None:
        return SetJudgement(verdict="reject", reason="no_usable_photo", message="not one photo can be used: the reason stands beside each")
    if not people.majority:
        return SetJudgement(verdict="reject", reason="ambiguous_identity",
                            message=f"no person is on most of the photos: at most {distinct} shots show the same one, {strangers} somebody else; keep one person's")
    if distinct < policy.min_photos:
        more = (f"add {policy.min_photos - distinct} more, taken at other times and places", *advice)
        if distinct + copies >= policy.min_photos:
            return SetJudgement(verdict="reject", reason="too_few_distinct_photos", advice=more,
                                message=f"{distinct + copies} files, but only {distinct} different shots; {policy.min_photos} are needed")
        return SetJudgement(verdict="reject", reason="too_few_photos", advice=more,
                            message=f"{distinct} usable photos of one person, {policy.min_photos} are needed")
    return SetJudgement(verdict="ok", reason=None, message=f"{distinct} photos of one person", advice=tuple(advice))


@dataclass(frozen=True)
class Look:
    """What one photo adds to the set."""

    turn: float          # nose to the side of the eyes' middle, in eye distances: about 0.3 at a half profile
    face_rel: float      # face height / photo height
    luma: float          # mean of the face, 0..255
    colourful: bool
    shows: Mapping[str, str] = field(default_factory=dict)      # slots that a reader is sure of, e.g. {"hat": "beanie"}


# slot -> (values that are no habit, what to say of one that is on nearly every photo)
_HABITS: Mapping[str, tuple[frozenset[str], str]] = {
    "hat": (frozenset({"none"}), "a hat is on nearly every photo: add two without it, or it becomes part of the person"),
    "eyewear": (frozenset({"none"}), "glasses of one kind are on nearly every photo: add two without them, or they become part of the person"),
    "expression": (frozenset(), "the expression is the same on nearly every photo: add two with another one"),
    "garment": (frozenset(), "the clothes are of one kind on nearly every photo: add two in others"),
    "place": (frozenset(), "nearly every photo was taken in the same kind of place: add two taken elsewhere"),
}
_HABIT_SHARE = 0.8
_HABIT_PHOTOS = 5             # fewer photos say nothing about habits


def _habits(looks: Sequence[Look]) -> list[str]:
    """What nearly every photo shares, by slots that a reader is sure of; a photo it is not sure of counts against a habit."""
    said = []
    for slot, (harmless, words) in _HABITS.items():
        values = [look.shows[slot] for look in looks if slot in look.shows]
        if len(looks) >= _HABIT_PHOTOS and any(values.count(v) >= _HABIT_SHARE * len(looks) for v in set(values) - harmless):
            said.append(words)
    return said


def advise(looks: Sequence[Look]) -> tuple[str, ...]:
    """What would make the set better; empty for one with nothing to wish for."""
    if not looks:
        return ()
    advice = []
    if len(looks) < 8:
        advice.append(f"{len(looks)} photos are few: eight or more, on different days and in different clothes, give a better likeness")
    turns = np.array([look.turn for look in looks])
    if np.abs(turns).max() < 0.15:
        advice.append("every photo is taken from the front: add two with the head turned to the left and to the right")
    elif np.abs(turns).min() > 0.15:
        advice.append("no photo is taken from the front: add two")
    sizes = np.array([look.face_rel for look in looks])
    if sizes.max() < 1.4 * sizes.min():
        advice.append("every photo has the same framing: add a closer one and one from further away")
    lights = np.array([look.luma for look in looks])
    if len(looks) >= 3 and lights.max() - lights.min() < 25:
        advice.append("the light is the same on every photo: add one taken outdoors and one indoors")
    if not any(look.colourful for look in looks):
        advice.append("every photo is black and white: add photos in colour, or the pictures will be grey")
    return (*advice, *_habits(looks))
