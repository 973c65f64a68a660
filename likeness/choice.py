"""Which checkpoint of a training becomes the Adapter. Pure: points of a curve in, one of them out.

With every step a training draws the person better, and obeys prompts worse that contradict the photos. The knee is where a little more of the
one begins to cost as much of the other. Both scores are shares, so "as much" is: their product no longer grows. The largest rectangle under the curve does
not depend on how either is scaled, and a checkpoint that has lost one of the two altogether never wins.

A point's merit depends on nothing but itself, so the winner among the first points is the only one of them that can win later: no other need be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from likeness.records import CurvePoint

FALLS = 2                      # so often in a row both scores fall before a training is ended


def merit(point: CurvePoint) -> tuple[int, float, float, int]:
    """What points are compared by, greater is better.

    Measured whole comes before measured in part: identity alone counts where nothing was asked against the photos; without identity nothing counts, and
    of such points the last is taken, as if none had been scored. Equals go by the sum of both scores, then to the earlier step, which has moved less.
    """
    if point.identity is None:
        return 0, 0.0, 0.0, point.step
    if point.obedience is None:
        return 1, point.identity, 0.0, -point.step
    return 2, point.identity * point.obedience, point.identity + point.obedience, -point.step


def knee(points: Sequence[CurvePoint]) -> CurvePoint:
    """The checkpoint that becomes the Adapter.

    Raises:
        ValueError: there is none.
    """
    return max(points, key=merit)


def stop_early(points: Sequence[CurvePoint]) -> bool:
    """Whether to end a training: identity and obedience both fell from each of the last points to the next, FALLS times. What was not measured did not fall."""
    last = points[-FALLS - 1:]
    return len(last) > FALLS and all(_falls(before, after) for before, after in pairwise(last))


def _falls(before: CurvePoint, after: CurvePoint) -> bool:
    pairs = ((before.identity, after.identity), (before.obedience, after.obedience))
    return all(a is not None and b is not None and b < a for a, b in pairs)
