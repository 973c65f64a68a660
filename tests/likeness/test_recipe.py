"""Recipes: equal numbers, equal digest; what cannot be is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from likeness.recipe import RECIPE, Lora, Objective


def test_equal_recipes_have_one_digest_however_they_were_written() -> None:
    written = RECIPE.validate_json('{"rank": 16, "method": "lora", "objective": {"min_snr": 5}}')
    assert written == Lora()
    assert written.digest == Lora().digest == RECIPE.validate_json(Lora().model_dump_json()).digest


@pytest.mark.parametrize("change", [{"steps": 201}, {"seed": 1}, {"base": "sd15"}, {"targets": ("attention",)}, {"objective": Objective(prior_weight=0.0)}],
                         ids=lambda c: next(iter(c)))
def test_every_number_is_in_the_digest(change: dict[str, Any]) -> None:
    assert Lora(**change).digest != Lora().digest


@pytest.mark.parametrize(("text", "place"), [
    ('{"method": "lora", "rnak": 16}', "rnak"), ('{"method": "magic"}', "method"), ('{"rank": 0}', "rank"), ('{"rank": "16"}', "rank"),
    ('{"rank": 16.5}', "rank"), ('{"learning_rate": 0}', "learning_rate"), ('{"learning_rate": NaN}', "learning_rate"), ('{"targets": []}', "targets"),
    ('{"targets": ["text"]}', "targets"), ('{"objective": {"prior": 1}}', "prior"), ('{"objective": {"caption_dropout": 0.6}}', "caption_dropout"),
    ('{"seed": 2147483648}', "seed"), ('{"steps": true}', "steps"),
])
def test_what_cannot_be_is_refused_by_name(text: str, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RECIPE.validate_json(text)
    assert place in [part for error in caught.value.errors() for part in error["loc"]]
