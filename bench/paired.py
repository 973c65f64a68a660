"""What a row of `make bench-methods` measures, and paired bootstrap intervals of the difference of two rows.

Two rows have the same users, prompts and seeds, sample by sample. A resample draws users with replacement, and of each drawn user samples with
replacement, the same for both rows; the interval is that of the differences. With one user only samples are drawn: such an interval says
nothing of other users. Pure.

Shapes: N samples of a user, B pictures of the class noun alone, U impostors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALSE_ACCEPTS = 0.01
RESAMPLES = 1000
HIGHER_IS_BETTER = ("auc", "true_accepts", "editability", "diversity", "pose_spread")
MEASURES = (*HIGHER_IS_BETTER, "drift", "defects_per_100", "copies_per_100")
BARS = ("auc", "editability", "diversity")         # the three that a method is held to
WORST = -0.03                                      # where the interval of none of them may begin below

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """One user's samples of one row, as the networks saw them.

    Attributes:
        genuine: distance to the centroid of the user's witnesses (N), NaN without exactly one face.
        impostor: distances to those of the others (N, U), NaN likewise.
        plain: not stylised (N): only these are asked who they show.
        right, asked: slots (N) that contradict the user's portraits: seen, and asked for.
        apart: appearance distance of every two samples (N, N).
        yaw: how far the nose is from the middle of the eyes, in eye distances (N), NaN without a face.
        defect, copy: findings of a gated type; nearer to a training crop than the gate lets pass (N).
        bare: distance to the centroid of the user's witnesses (B), of pictures of the class noun alone; NaN without exactly one face.
    """

    genuine: Floats
    impostor: Floats
    plain: Bools
    right: NDArray[np.int64]
    asked: NDArray[np.int64]
    apart: Floats
    yaw: Floats
    defect: Bools
    copy: Bools
    bare: Floats


Draw = Sequence[tuple[int, NDArray[np.int64], NDArray[np.int64]]]      # (user, numbers of samples, of pictures of the class noun alone), once for each drawn user


def whole(looks: Sequence[Look]) -> Draw:
    """Everybody once, every sample once."""
    return [(user, np.arange(len(look.genuine)), np.arange(len(look.bare))) for user, look in enumerate(looks)]


def measure(looks: Sequence[Look], draw: Draw) -> dict[str, float]:
    """Every measure of a row; NaN where nothing says it (no sample passed, nothing was asked).

    `true_accepts`: share of unstylised samples nearer than the distance under which FALSE_ACCEPTS of the impostor pairs lie; those samples are what
    `diversity` (mean appearance distance of two of one user) and `pose_spread` (standard deviation of yaw of one user's) are of. `drift`: share of the pictures
    of the class noun alone that are nearer than it, for which everybody of the class has become the user.
    """
    own, others = [], []
    for user, picks, _ in draw:
        seen = picks[looks[user].plain[picks] & ~np.isnan(looks[user].genuine[picks])]
        own.append(looks[user].genuine[seen])
        others.append(looks[user].impostor[seen].ravel())
    genuine, impostor = np.concatenate(own), np.sort(np.concatenate(others))
    threshold = float(np.quantile(impostor, FALSE_ACCEPTS)) if len(impostor) else math.nan
    right = asked = accepted = plain = defects = copies = samples = drifted = alone = 0
    spreads, poses = [], []
    for user, picks, bare in draw:
        look = looks[user]
        drifted, alone = drifted + int((look.bare[bare] < threshold).sum()), alone + len(bare)
        passed = picks[look.plain[picks] & (look.genuine[picks] < threshold)]
        accepted, plain, samples = accepted + len(passed), plain + int(look.plain[picks].sum()), samples + len(picks)
        right, asked = right + int(look.right[picks].sum()), asked + int(look.asked[picks].sum())
        defects, copies = defects + int(look.defect[picks].sum()), copies + int(look.copy[picks].sum())
        pairs = passed[:, None] != passed[None]           # a sample that was drawn twice is no pair
        if pairs.any():
            spreads.append(float(look.apart[np.ix_(passed, passed)][pairs].mean()))
            poses.append(float(look.yaw[passed].std()))
    return {"auc": auc(genuine, impostor), "true_accepts": _share(accepted, plain), "editability": _share(right, asked), "diversity": _mean(spreads),
            "pose_spread": _mean(poses), "drift": _share(drifted, alone), "defects_per_100": 100 * _share(defects, samples), "copies_per_100": 100 * _share(copies, samples)}


def auc(genuine: Floats, impostor_sorted: Floats) -> float:
    """Chance that a genuine distance is smaller than an impostor's, a tie counting half; NaN without one of a kind."""
    if not len(genuine) or not len(impostor_sorted):
        return math.nan
    below, upto = (np.searchsorted(impostor_sorted, genuine, side) for side in ("left", "right"))
    return float(1 - (below + upto).mean() / (2 * len(impostor_sorted)))


def differences(ours: Sequence[Look], theirs: Sequence[Look], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """(difference, lower, upper end of its 95 % interval) of every measure, ours less theirs. Resamples in which a measure says nothing are left out.

    Raises:
        ValueError: the rows are not of the same users and samples.
    """
    if [(len(look.genuine), len(look.bare)) for look in ours] != [(len(look.genuine), len(look.bare)) for look in theirs] or not ours:
        raise ValueError("two rows are compared over the same users and samples")
    rng = np.random.default_rng(seed)
    rows: list[dict[str, float]] = []
    for _ in range(resamples):
        users = rng.integers(0, len(ours), len(ours))
        draw = [(int(u), *(rng.integers(0, n, n) for n in (len(ours[u].genuine), len(ours[u].bare)))) for u in users]
        mine, yours = measure(ours, draw), measure(theirs, draw)
        rows.append({name: mine[name] - yours[name] for name in MEASURES})
    at, other = measure(ours, whole(ours)), measure(theirs, whole(theirs))
    found = {}
    for name in MEASURES:
        values = np.array([row[name] for row in rows])
        values = values[~np.isnan(values)]
        low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (math.nan, math.nan)
        found[name] = (at[name] - other[name], float(low), float(high))
    return found


def held(found: dict[str, tuple[float, float, float]]) -> tuple[bool, str]:
    """(whether the bars hold, why or why not): no interval of BARS begins below WORST, at least two lie above 0."""
    unknown = [name for name in BARS if math.isnan(found[name][1])]
    below = [name for name in BARS if found[name][1] < WORST]
    above = [name for name in BARS if found[name][1] > 0]
    if not below and not unknown and len(above) >= 2:
        return True, f"above 0: {', '.join(above)}"
    reasons = ([f"not measured: {', '.join(unknown)}"] if unknown else []) + ([f"interval of {', '.join(below)} begins below {WORST}"] if below else []) + ([f"above 0 only: {', '.join(above) or 'none'}"] if len(above) < 2 else [])
    return False, "; ".join(reasons)


def _share(part: int, all_of: int) -> float:
    return part / all_of if all_of else math.nan


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
