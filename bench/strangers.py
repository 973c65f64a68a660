"""Photos of other people planted among a person's own: how many are found, and how many good photos are lost with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from likeness.intake.policy import IntakePolicy
from likeness.intake.sets import find_person
from models.faces.face import SAME_PERSON_DISTANCE

SET_SIZE = 12          # photos in a set, strangers among them; a person with fewer photos gives all of them
TRIALS = 10            # sets for each person and number of strangers


def plant(vectors: NDArray[np.float32], who: NDArray[np.str_], *, seed: int = 5) -> dict[str, Any]:
    """Sets of each person with 1 to 4 strangers, judged as intake judges them.

    Args:
        vectors: (N, D), NaN where no face was found; those are left out.
        who: (N,) the person on each.

    Returns:
        `recall` (share of strangers that are found), `good_refused` (share of own photos that are refused), `sets`, and `recall_by_number`.
    """
    here = np.isfinite(vectors).all(1)
    v, who = vectors[here], who[here]
    policy, rng = IntakePolicy(), np.random.default_rng(seed)
    limit = policy.stranger_distance * SAME_PERSON_DISTANCE
    found: dict[int, list[bool]] = {}
    refused: list[bool] = []
    sets = 0
    for person in np.unique(who):
        own, others = np.flatnonzero(who == person), np.flatnonzero(who != person)
        for count in range(1, 5):
            size = min(len(own), SET_SIZE - count)
            if size < 2 * count:           # at least two thirds of a set are the person
                continue
            for _ in range(TRIALS):
                chosen = np.concatenate([rng.choice(own, size, replace=False), rng.choice(others, count, replace=False)])
                mine = find_person(v[chosen], list(range(len(chosen))), limit=limit, majority=policy.majority).mine
                refused += (~mine[:size]).tolist()
                found.setdefault(count, []).extend((~mine[size:]).tolist())
                sets += 1
    every = [f for flags in found.values() for f in flags]
    return {"sets": sets, "recall": float(np.mean(every)), "good_refused": float(np.mean(refused)), "recall_by_number": {str(n): float(np.mean(f)) for n, f in found.items()}}
