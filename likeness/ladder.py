"""The retry ladder: which recipe to try after a refusal, and why. Pure: from the attempts so far, and the `ladder` of the settings.

Recipes that a person wrote into `ladder` come first, in their order. After them rules change one thing at a time, beginning at the best attempt so far, because
what helped is kept, then at the next best. A recipe that was tried is never proposed again, and every number has a bound, so a ladder ends. Nothing
random and no clock is in it: the same published judgements give the same path, which is why a run that was killed takes it again.

A number on the wrong side of the preset's goes back to the preset's first, which was measured (`python -m bench.ladder`: docs/ladder.md). Beyond it the numbers (twice, half,
the bounds) are starting points that nobody has measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from likeness.recipe import PRESERVATION, PRIOR_WEIGHTS, RECIPE, Lora, Objective, Pivotal, Recipe, TextualInversion, preset
from likeness.records import Reason, Verdict

MOST = 10                       # attempts: the upper limit of the setting `max_attempts`
BEYOND_PRESET = 4               # steps and learning rate stay within the preset's number times and divided by this
MOST_STEPS = 20_000             # the limit of `recipe.steps`
MOST_RANK = 64
MOST_PRIOR = 4.0                # where output preservation keeps the class, at the price of likeness: docs/methods.md
DROPPED = 0.1                   # share of empty captions
TOO_MUCH = ("faces", "defects", "copies", "editability", "diversity", "drift")     # reasons that say of a training that it went too far
TOO_LITTLE = ("identity",)                                     # and not far enough


@dataclass(frozen=True)
class Attempt:
    """One training that was judged, and why its recipe was chosen."""

    recipe: Recipe
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Step:
    """What comes next: a recipe and why, or None and why not."""

    recipe: Recipe | None
    why: str


def next_step(attempts: Sequence[Attempt], ladder: Sequence[Recipe]) -> Step:
    """The recipe to try after these attempts, or none: for an empty list, or when the last Verdict is not `retry`, none either.

    Args:
        attempts: everything tried on this training set, in order.
        ladder: recipes of the settings; they win over the rules.
    """
    if not attempts:
        return Step(None, "nothing was judged yet, so nothing says what to change")
    kind = attempts[-1].verdict.kind
    if kind != "retry":
        return Step(None, f"the verdict is {kind!r}: another recipe does not change that")
    if len(attempts) >= MOST:
        return Step(None, f"{len(attempts)} attempts were made, and more than {MOST} are never: other photos may help where recipes do not")
    tried = {a.recipe.digest for a in attempts}
    for number, recipe in enumerate(ladder, 1):
        if recipe.digest not in tried:
            return Step(recipe, f"entry {number} of `ladder`, after: {_complaint(attempts[-1].verdict)}")
    for attempt in sorted(attempts, key=_merit, reverse=True):
        for reason, recipe, change in _cures(attempt, attempts):
            if recipe.digest not in tried:
                return Step(recipe, f"{change}, because {reason.message}")
    return Step(None, "no rule has a recipe that was not tried: add one to `ladder`, or photos")


def best(attempts: Sequence[Attempt]) -> int:
    """Index of the attempt that counts: the first accepted one, or else the one with the largest share of recognisable samples, then with
    the median sample nearest to the own photos, then the earliest.

    Raises:
        ValueError: if there is none.
    """
    accepted = [i for i, a in enumerate(attempts) if a.verdict.kind == "accepted"]
    return accepted[0] if accepted else max(range(len(attempts)), key=lambda i: (*_merit(attempts[i]), -i))


def differences(before: Recipe, after: Recipe) -> str:
    """What `after` says differently, in words: "steps 400 (was 200)"."""
    was, now = _flat(before.whole()), _flat(after.whole())
    changed = [key for key in now if now[key] != was.get(key)]
    return ", ".join(f"{key.replace('_', ' ')} {_short(now[key])}" + (f" (was {_short(was[key])})" if key in was else "") for key in changed) or "nothing"


def _merit(attempt: Attempt) -> tuple[float, float]:
    """Share of recognisable samples; between equals, which at the start of a ladder are all zero, where the median sample lies between strangers and own photos."""
    share, position = (-1.0 if value is None or not math.isfinite(value) else value
                       for value in (attempt.verdict.scores.get("identity_share"), attempt.verdict.scores.get("identity_position")))
    return share, position


def _complaint(verdict: Verdict) -> str:
    return "; ".join(reason.message for reason in verdict.reasons)


# -- the rules: reason code of the gate -> changes to try, in this order.

_Change = Callable[[Recipe, Sequence[Attempt]], tuple[Recipe, str] | None]


def _cures(attempt: Attempt, attempts: Sequence[Attempt]) -> Iterator[tuple[Reason, Recipe, str]]:
    """Changes that answer this attempt's reasons. Going too far is answered first: where faces are broken, identity is low for that reason alone. But a training that is
    shorter than the preset's, no hotter, and draws whole faces has not gone too far, whatever else is said of it: samples of nobody are alike too.
    """
    if attempt.verdict.kind != "retry":
        return
    by_code = {reason.code: reason for reason in attempt.verdict.reasons}
    usual = _usual(attempt.recipe)
    if attempt.recipe.steps < usual.steps and attempt.recipe.learning_rate <= usual.learning_rate and "identity" in by_code and not by_code.keys() & {"faces", "defects"}:
        yield by_code["identity"], *_changed(attempt.recipe, steps=usual.steps)
    for code, changes in RULES.items():
        if code in by_code:
            for change in changes:
                changed = change(attempt.recipe, attempts)
                if changed is not None:
                    yield by_code[code], *changed


def _fewer_steps(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    """The preset's steps, where they are fewer, or else half; the middle, where fewer are known to be too few."""
    known = [n for n, codes in _other_lengths(recipe, attempts) if n < recipe.steps and codes <= {*TOO_LITTLE}]
    if known:
        middle = _middle(max(known), recipe.steps)
        if middle is None:
            return None
        return _changed(recipe, steps=middle)
    if recipe.steps > _usual(recipe).steps:
        return _changed(recipe, steps=_usual(recipe).steps)
    return _changed(recipe, steps=recipe.steps // 2) if recipe.steps // 2 >= max(1, _usual(recipe).steps // BEYOND_PRESET) else None


def _more_steps(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    """The preset's steps, where they are more, or else twice as many; the middle, where more are known to be too many."""
    known = [n for n, codes in _other_lengths(recipe, attempts) if n > recipe.steps and codes & {*TOO_MUCH}]
    if known:
        steps = _middle(recipe.steps, min(known))
        return None if steps is None else _changed(recipe, steps=steps)
    if recipe.steps < _usual(recipe).steps:
        return _changed(recipe, steps=_usual(recipe).steps)
    return _changed(recipe, steps=2 * recipe.steps) if 2 * recipe.steps <= BEYOND_PRESET * _usual(recipe).steps else None


def _more_rank(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    if not isinstance(recipe, Lora | Pivotal) or 2 * recipe.rank > MOST_RANK or 2 * recipe.alpha > 1024:
        return None
    return _changed(recipe, rank=2 * recipe.rank, alpha=2 * recipe.alpha)      # alpha / rank, the scale of the update, stays


def _pivotal(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    """Pivotal tuning with the factors, or the vectors, that `recipe` has."""
    if isinstance(recipe, Pivotal):
        return None
    values = preset("pivotal", recipe.base)
    objective = {**values.get("objective", {}), **{name: getattr(recipe.objective, name) for name in type(recipe.objective).model_fields}}
    plain = recipe.plain()
    keep: Iterable[str] = ("seed", "max_grad_norm", "decoder_steps", "decoder_learning_rate", "choice")
    if isinstance(recipe, Lora):
        keep = [name for name in Lora.model_fields if name != "method"]
        share = values.get("inversion_share", Pivotal.model_fields["inversion_share"].default)
        plain["steps"] = min(MOST_STEPS, math.ceil(recipe.steps / (1 - share)))  # as many for the factors as they had, the vectors' come before them
    elif isinstance(recipe, TextualInversion):
        keep = ("seed", "max_grad_norm", "vectors", "norm_slack", "vectors_learning_rate", "choice")      # its decoder was left alone on purpose
        plain["vectors_learning_rate"] = recipe.learning_rate
    values |= {name: plain.get(name, getattr(recipe, name, None)) for name in keep} | {"objective": objective}
    return RECIPE.validate_python(values, strict=False), f"pivotal instead of {recipe.method}"


def _usual_rate(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    """The preset's rate, where it is lower: no other cure helps a training that breaks the faces for that reason."""
    usual = _usual(recipe).learning_rate
    return _changed(recipe, learning_rate=usual) if recipe.learning_rate > usual else None


def _lower_rate(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    rate = recipe.learning_rate / 2
    return _changed(recipe, learning_rate=rate) if rate >= _usual(recipe).learning_rate / BEYOND_PRESET else None


def _stronger_prior(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    objective = recipe.objective
    if not isinstance(objective, Objective):
        return None                                                            # only words are trained: there is no class to keep
    if objective.prior_weight == 0:                                            # with what needs no pictures of the class, which it may not have
        return _prior(recipe, **PRESERVATION)
    return _prior(recipe, prior_weight=2 * objective.prior_weight) if 2 * objective.prior_weight <= MOST_PRIOR else None


def _empty_captions(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    objective = recipe.objective
    if not isinstance(objective, Objective) or objective.caption_dropout > 0:
        return None
    return _prior(recipe, caption_dropout=DROPPED)


def _class_pictures(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    """Class pictures, where nothing keeps the class: they keep heads turning, docs/methods.md."""
    objective = recipe.objective
    if not isinstance(objective, Objective) or objective.prior_weight > 0:
        return None
    return _prior(recipe, prior="class_pictures", prior_weight=PRIOR_WEIGHTS["class_pictures"])


def _output_preservation(recipe: Recipe, attempts: Sequence[Attempt]) -> tuple[Recipe, str] | None:
    objective = recipe.objective
    if not isinstance(objective, Objective) or (objective.prior == "dop" and objective.prior_weight > 0):
        return None
    return _prior(recipe, prior="dop", prior_weight=objective.prior_weight or PRIOR_WEIGHTS["dop"])


RULES: Mapping[str, tuple[_Change, ...]] = {
    "faces": (_usual_rate, _fewer_steps, _lower_rate, _stronger_prior),
    "defects": (_usual_rate, _lower_rate, _fewer_steps, _stronger_prior),
    "copies": (_usual_rate, _fewer_steps, _stronger_prior, _lower_rate),
    "editability": (_usual_rate, _fewer_steps, _stronger_prior, _output_preservation),
    "diversity": (_usual_rate, _class_pictures, _output_preservation, _stronger_prior, _empty_captions, _fewer_steps),
    "drift": (_usual_rate, _stronger_prior, _output_preservation, _fewer_steps),
    "identity": (_more_steps, _more_rank, _pivotal),
}


def _usual(recipe: Recipe) -> Recipe:
    """The preset of this method and base, which the bounds are multiples of."""
    return RECIPE.validate_python(preset(recipe.method, recipe.base), strict=False)


def _changed(recipe: Recipe, **values: Any) -> tuple[Recipe, str]:
    after = RECIPE.validate_python({**recipe.plain(), **values}, strict=False)
    return after, differences(recipe, after)


def _prior(recipe: Recipe, **values: Any) -> tuple[Recipe, str]:
    return _changed(recipe, objective={**recipe.plain()["objective"], **values})


def _other_lengths(recipe: Recipe, attempts: Sequence[Attempt]) -> list[tuple[int, set[str]]]:
    """(steps, reason codes) of refused attempts that differ from `recipe` in nothing but steps."""
    return [(a.recipe.steps, {r.code for r in a.verdict.reasons}) for a in attempts
            if a.recipe.method == recipe.method and a.verdict.kind == "retry" and {**a.recipe.plain(), "steps": 0} == {**recipe.plain(), "steps": 0}]


def _middle(low: int, high: int) -> int | None:
    """A number between that differs from both enough to matter."""
    return (low + high) // 2 if high >= 1.5 * low and high - low >= 2 else None


def _flat(plain: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= dict(value) if isinstance(value, Mapping) else {key: value}
    return flat


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
