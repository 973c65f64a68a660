"""How likely acceptance is before anything is trained: a logistic regression on what intake already knows of a set of photos.

Two things are looked at. *Kept*: how far the person's photos lie from the person once the base's own autoencoder has had them, the best any
training over that base can hope for; and the number of usable photos. The rows that were measured ship with the estimate, so that it can be
made again, and it holds for the base, recipe and policy that made them and for no other.

The fit is Bayesian, with a normal prior on standardised features (Gelman et al. 2008, "A weakly informative default prior distribution for logistic
and other regression models", arXiv 0901.4011, has the reasons; theirs is a Cauchy) and Laplace's approximation, so a few dozen rows give a wide
interval and not a certainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from likeness.digest import Digest
from likeness.records import Record

PRIOR_SD = 2.5            # of a weight, per standard deviation of its feature
CREDIBLE_Z = 1.645        # of 90 %
ENOUGH_ROWS = 12          # fewer are no ground for an estimate


class Prospect(Record):
    """What intake knows of a set that says something about its acceptance."""

    photos: int = Field(ge=1, description="usable, distinct photos of the person")
    kept: float = Field(ge=0, description="median identity distance of the photos, encoded and decoded by the base, to the centroid of the others")


class Trial(Record):
    """One set that was personalised, and what became of it."""

    prospect: Prospect
    accepted: bool
    identity_share: float | None = Field(ge=0, le=1)
    people: str = Field("rendered", description="who is on the photos: rendered, or real")


class Trials(Record):
    """Sets that were personalised over one base with one recipe under one policy, and when."""

    base: str                             # name
    revision: str
    recipe: Digest
    policy: Digest
    drawn: Digest                         # battery and sampling: what was judged
    backend: str
    date: str
    command: str
    rows: tuple[Trial, ...]


class Estimate(Record):
    """How likely a set is accepted: a probability with its 90 % interval."""

    accepted: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    photos: int = Field(ge=1)
    kept: float = Field(ge=0)
    outside: bool = Field(description="the set is unlike all that were measured, so the numbers are a guess")
    sets: int = Field(ge=1, description="how many sets were measured")
    date: str

    @property
    def words(self) -> str:
        """For a person."""
        sure = "" if not self.outside else ", though no set like this one was measured"
        least, most = max(self.low, 0.01), min(self.high, 0.99)               # so few sets show no certainty, whatever rounding says
        return f"about {self.accepted:.0%} of sets like this are accepted (90 % interval {least:.0%} to {most:.0%}, from {self.sets} sets){sure}"


class Fit:
    """The regression over some trials; raises ValueError for fewer than ENOUGH_ROWS."""

    def __init__(self, rows: Sequence[Trial]) -> None:
        if len(rows) < ENOUGH_ROWS:
            raise ValueError(f"{len(rows)} sets were measured, {ENOUGH_ROWS} are needed for an estimate")
        self._rows = list(rows)
        features = np.array([_features(r.prospect) for r in rows])
        self._mean, self._spread = features.mean(0), np.maximum(features.std(0), 1e-6)
        self._low, self._high = features.min(0), features.max(0)
        x = self._design(features)
        y = np.array([float(r.accepted) for r in rows])
        precision = np.diag([1e-2, *[1 / PRIOR_SD ** 2] * features.shape[1]])       # the intercept is free to be anywhere
        weights = np.zeros(x.shape[1])
        for _ in range(100):                                                        # Newton's method; the posterior is concave
            p = _logistic(x @ weights)
            self.hessian = x.T @ (x * (p * (1 - p))[:, None]) + precision
            step = np.linalg.solve(self.hessian, x.T @ (y - p) - precision @ weights)
            weights = weights + step
            if np.abs(step).max() < 1e-10:
                break
        self.weights: NDArray[np.float64] = weights

    def estimate(self, prospect: Prospect, *, date: str) -> Estimate:
        """The probability for one set: the mean over the posterior (MacKay 1992) with the interval of its linear part."""
        raw = _features(prospect)
        x = self._design(raw[None])[0]
        centre, variance = float(x @ self.weights), float(x @ np.linalg.solve(self.hessian, x))
        reach = CREDIBLE_Z * math.sqrt(variance)
        accepted = _logistic(np.array(centre / math.sqrt(1 + math.pi * variance / 8)))
        outside = bool((raw < self._low - 0.05 * (self._high - self._low) - 1e-9).any() or (raw > self._high + 0.05 * (self._high - self._low) + 1e-9).any())
        return Estimate(accepted=round(float(accepted), 4), low=round(float(_logistic(np.array(centre - reach))), 4), high=round(float(_logistic(np.array(centre + reach))), 4),
                        photos=prospect.photos, kept=round(prospect.kept, 4), outside=outside, sets=len(self._rows), date=date)

    def _design(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.hstack([np.ones((len(features), 1)), (features - self._mean) / self._spread])


def left_out(rows: Sequence[Trial], groups: Sequence[str]) -> list[float]:
    """For each row its estimate by the rows of all other groups (people): what the estimate is worth for somebody new."""
    return [Fit([r for r, g in zip(rows, groups, strict=True) if g != group]).estimate(row.prospect, date="").accepted for row, group in zip(rows, groups, strict=True)]


def _features(prospect: Prospect) -> NDArray[np.float64]:
    return np.array([prospect.kept, math.log2(prospect.photos)])


def _logistic(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * value)))       # no overflow
