"""How often each threshold of the gate errs: calibrations, measured on people of whom the truth is known. They stand beside the policy and decide nothing.

A calibration belongs to the conditions that it was measured under (thresholds, networks, bank, base, what is drawn, epoch of the stage `judge`); under any others nobody
knows. `likeness gate calibrate` measures them, those of the defaults ship. Pure: what is measured, and on which pictures, is `models.quality.calibrating`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Self

from pydantic import Field, TypeAdapter

from likeness.digest import Digest
from likeness.gate import GatePolicy, chances
from likeness.records import Record

FILE = Path(__file__).with_name("calibrations.json")
Z = 1.96                  # of a 95 % interval
Tally = tuple[float, float]          # of one person: how many events (or their chances, summed), of how many


class Rate(Record):
    """A share with its 95 % interval."""

    rate: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    n: int = Field(ge=1, description="pictures or sets")
    people: int = Field(ge=1, description="whom they are of")

    @classmethod
    def of(cls, *tallies: Sequence[Tally]) -> Self:
        """The share of events among everything counted, with Wilson's interval of as many independent observations as the data are worth.

        Pictures of one person err together, so a count of pictures promises too much. The variance of the share p = sum(e) / sum(n) between people is
        v = P / (P - 1) * sum((e - p n)^2) / sum(n)^2 (the ratio estimator of cluster sampling, P people), and the data are worth p (1 - p) / v pictures, at most those that
        there are. Where everybody errs alike (p is 0 or 1) v says nothing: then they are worth as many as there are people.

        Args:
            tallies: the same events counted by person, and, where a picture has two of them (who is asked for, who is on it), by each; the larger variance counts.
        """
        first = [t for t in tallies[0] if t[1] > 0]
        asked = sum(n for _, n in first)
        p = min(1.0, max(0.0, sum(e for e, _ in first) / asked))
        worth = min(_worth([t for t in tally if t[1] > 0], p) for tally in tallies)
        low, high = wilson(p, worth)
        return cls(rate=round(p, 5), low=round(low, 5), high=round(high, 5), n=max(1, round(asked)), people=len(first))

    @property
    def words(self) -> str:
        """For a person: "1.2 % (0.4 to 3.1)"."""
        return f"{_percent(self.rate)} % ({_percent(self.low)} to {_percent(self.high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _worth(tally: Sequence[Tally], p: float) -> float:
    people, asked = len(tally), sum(n for _, n in tally)
    variance = people / (people - 1) * sum((e - p * n) ** 2 for e, n in tally) / asked ** 2 if people > 1 else 0.0
    return float(people) if variance <= 1e-15 or p * (1 - p) <= 1e-15 else max(1.0, min(asked, p * (1 - p) / variance))


def wilson(p: float, n: float) -> tuple[float, float]:
    """The 95 % score interval of a share p of n independent observations: the q with |p - q| = Z sqrt(q (1 - q) / n)."""
    middle, reach = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


class Point(Record):
    """Both errors of one threshold, were it at `value`."""

    value: float
    false_accept: float
    false_refusal: float


class Calibration(Record):
    """How often one threshold errs.

    A false accept lets through what the threshold is there to refuse, a false refusal refuses what it is there to let through; both are of this threshold alone.
    """

    threshold: str                                   # key of the policy, or "finding CODE"
    value: float | None                              # in force; None for a finding without a number
    data: str = Field(description="what was accepted falsely, and refused falsely, in words")
    false_accept: Rate | None = None
    false_refusal: Rate | None = None
    parts: dict[str, Rate] = Field({}, description="false accepts of parts of the data, or of data beside it")
    curve: tuple[Point, ...] = ()
    equal: Point | None = Field(None, description="of the curve, where both errors are nearest to each other: the middle of that range")
    unmeasured: str | None = Field(None, description="why there are no rates")

    @property
    def words(self) -> str:
        """For a person."""
        if self.false_accept is None or self.false_refusal is None:
            return f"not measured: {self.unmeasured}"
        return f"wrongly let through {self.false_accept.words}, wrongly refused {self.false_refusal.words}"


class Conditions(Record):
    """What a rate depends on."""

    thresholds: Digest        # of the policy, whatever calibrations it names
    recogniser: str
    second: str | None        # the second recogniser, where one votes
    bank: str
    base: str                 # name
    revision: str
    drawn: Digest             # battery and sampling
    slots: Digest             # the network that reads pictures
    usual: Digest             # where findings begin
    unsafe: str               # the network that says what is unsafe
    epoch: int                # of the stage `judge`


WORDS = {"thresholds": "other thresholds", "recogniser": "another recogniser", "second": "another second recogniser", "bank": "another bank of impostors", "base": "another base",
         "revision": "another revision of the base", "drawn": "another battery or other sampling", "slots": "another reader of slots", "usual": "other limits of findings", "unsafe": "another network for unsafe content",
         "epoch": "an earlier version of the gate's code"}


class Calibrations(Record):
    """One run of `likeness gate calibrate`."""

    conditions: Conditions
    date: str
    command: str
    people: int = Field(ge=1)
    pictures: int = Field(ge=1)
    source: Digest = Field(description="of the usable pictures")
    left_out: int = Field(ge=0, description="folders with too few usable photos")
    rows: tuple[Calibration, ...]

    def row(self, threshold: str) -> Calibration | None:
        """What is known of one threshold."""
        return next((r for r in self.rows if r.threshold == threshold), None)


@cache
def shipped() -> tuple[Calibrations, ...]:
    """Those of the defaults."""
    return TypeAdapter(tuple[Calibrations, ...]).validate_json(FILE.read_bytes())


def choose(known: Sequence[Calibrations], policy: GatePolicy, conditions: Conditions) -> tuple[Calibrations | None, str]:
    """(calibrations, words): those of exactly these conditions, the one that the policy names, or else the newest; None, and the words say why, if nobody measured them."""
    named = policy.calibration
    found = [c for c in known if c.conditions == conditions and named in (None, c.digest)]
    if found:
        best = max(found, key=lambda c: c.date)
        return best, f"measured on {best.pictures} pictures of {best.people} people, {best.date} (`{best.command}`)"
    how = "; `likeness gate calibrate --users FOLDER` measures them"
    if named is not None and named not in {c.digest for c in known}:
        return None, f"gate.calibration names {named[:12]}..., which is not kept here: how often these thresholds err is not known{how}"
    of = [c for c in known if named in (None, c.digest)]
    nearest = min((_differences(c.conditions, conditions) for c in of), key=len, default=["other conditions"])
    return None, f"nobody calibrated these thresholds here: what was measured is of {' and '.join(nearest)}{how}"


def _differences(known: Conditions, wanted: Conditions) -> list[str]:
    return [WORDS[name] for name in WORDS if getattr(known, name) != getattr(wanted, name)]


def curve_of(values: Sequence[float], false_accept: Callable[[float], float], false_refusal: Callable[[float], float]) -> tuple[Point, ...]:
    """Both errors at each of these values."""
    return tuple(Point(value=round(v, 5), false_accept=round(false_accept(v), 5), false_refusal=round(false_refusal(v), 5)) for v in values)


def equal_of(curve: Sequence[Point]) -> Point | None:
    """Where both errors are nearest to each other; of several such points those with the smaller errors, of these the middle one."""
    def key(p: Point) -> tuple[float, float]:
        return round(abs(p.false_accept - p.false_refusal), 5), round(p.false_accept + p.false_refusal, 5)

    best = min(map(key, curve), default=None)
    nearest = [p for p in curve if key(p) == best]
    return nearest[len(nearest) // 2] if nearest else None


def at_least(probabilities: Sequence[float], share: float) -> float:
    """The chance that at least this share of the events come about."""
    return min(1.0, max(0.0, sum(chances(probabilities)[math.ceil(share * len(probabilities) - 1e-9):])))
