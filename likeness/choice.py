"""Which checkpoint of a training becomes the Adapter. Pure: points of a curve in, one of them out.

With every step a training draws the person better, and obeys prompts worse that contradict the photos. The knee is where one hundredth more of the one begins
to cost a hundredth of the other: where the sum of both, which are shares, is largest. Their product would not depend on how either is scaled, but of few pictures
it hangs on one detail seen by chance (docs/log.md, 2026-11-27).

A point's merit depends on nothing but itself, so the winner among the first points is the only one of them that can win later: no other need be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from likeness.records import CurvePoint

FALLS = 2                      # so often in a row both scores fall before a training is ended


def merit(point: CurvePoint) -> tuple[int, float, int]:
    """What points are compared by, greater is better.

    Measured whole comes before measured in part: identity alone counts where nothing was asked against the photos; without identity nothing counts, and
    of such points the last is taken, as if none had been scored. Equals, to nine digits, go to the earlier step, which has moved less.
    """
    if point.identity is None:
        return 0, 0.0, point.step
    if point.obedience is None:
        return 1, round(point.identity, 9), -point.step
    return 2, round(point.identity + point.obedience, 9), -point.step


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
