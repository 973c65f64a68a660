"""Recipes: equal numbers, equal digest; what cannot be is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from likeness.recipe import METHODS, PRESETS, RECIPE, DreamBooth, Lora, Objective, Pivotal, TextualInversion, preset


def test_equal_recipes_have_one_digest_however_they_were_written() -> None:
    written = RECIPE.validate_json('{"rank": 16, "method": "lora", "objective": {"min_snr": 5}}')
    assert written == Lora()
    assert written.digest == Lora().digest == RECIPE.validate_json(Lora().model_dump_json()).digest


@pytest.mark.parametrize("change", [{"steps": 201}, {"seed": 1}, {"base": "sd15"}, {"targets": ("attention",)}, {"objective": Objective(prior_weight=0.0)}],
                         ids=lambda c: next(iter(c)))
def test_every_number_is_in_the_digest(change: dict[str, Any]) -> None:
    assert Lora(**change).digest != Lora().digest


def test_recipes_from_before_there_were_four_methods_keep_their_digest() -> None:
    assert Lora().digest.startswith("b90027001cbfbc8b")


def test_another_prior_is_another_recipe_and_the_usual_one_need_not_be_named() -> None:
    assert Objective(prior="class_pictures").digest == Objective().digest != Objective(prior="dop").digest
    assert Objective.read(Objective(prior="dop").model_dump_json()).prior == "dop"
    assert (Objective().wants_class_pictures, Objective(prior="dop").wants_class_pictures, Objective(prior_weight=0.0).wants_class_pictures) == (True, False, False)


def test_methods_with_equal_numbers_are_different_recipes() -> None:
    assert len({kind().digest for kind in METHODS.values()}) == len(METHODS) == 4  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_every_recipe_comes_back_from_json_as_what_it_was(kind: type[Any]) -> None:
    back = RECIPE.validate_json(kind().model_dump_json())
    assert type(back) is kind
    assert back.digest == kind().digest


@pytest.mark.parametrize(("text", "place"), [
    ('{"method": "lora", "rnak": 16}', "rnak"), ('{"method": "lora", "rank": 0}', "rank"), ('{"method": "lora", "rank": "16"}', "rank"),
    ('{"method": "lora", "rank": 16.5}', "rank"), ('{"method": "lora", "learning_rate": 0}', "learning_rate"),
    ('{"method": "dreambooth", "learning_rate": NaN}', "learning_rate"), ('{"method": "lora", "targets": []}', "targets"),
    ('{"method": "lora", "targets": ["text"]}', "targets"), ('{"method": "lora", "targets": ["text_encoder"]}', "targets"),
    ('{"method": "lora", "objective": {"prior": 1}}', "prior"), ('{"method": "pivotal", "objective": {"caption_dropout": 0.6}}', "caption_dropout"),
    ('{"method": "lora", "seed": 2147483648}', "seed"), ('{"method": "lora", "steps": true}', "steps"),
    # what another method has
    ('{"method": "dreambooth", "rank": 16}', "rank"), ('{"method": "lora", "vectors": 2}', "vectors"), ('{"method": "lora", "text_encoder": true}', "text_encoder"),
    ('{"method": "textual_inversion", "targets": ["attention"]}', "targets"), ('{"method": "textual_inversion", "text_encoder": true}', "text_encoder"),
    ('{"method": "textual_inversion", "objective": {"prior_weight": 0.5}}', "prior_weight"),
    ('{"method": "textual_inversion", "objective": {"caption_dropout": 0.1}}', "caption_dropout"),
    ('{"method": "pivotal", "inversion_share": 1.0}', "inversion_share"), ('{"method": "textual_inversion", "vectors": 0}', "vectors"),
])
def test_what_cannot_be_is_refused_by_name(text: str, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RECIPE.validate_json(text)
    assert place in [part for error in caught.value.errors() for part in error["loc"]]


@pytest.mark.parametrize("text", ['{"method": "magic"}', "{}"], ids=["unknown", "none"])
def test_a_method_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="method"):
        RECIPE.validate_json(text)


@pytest.mark.parametrize(("steps", "share", "pivot"), [(300, 1 / 3, 100), (10, 0.5, 5), (1, 0.9, 0), (2, 0.99, 1)])
def test_the_pivot_leaves_at_least_one_step_of_tuning(steps: int, share: float, pivot: int) -> None:
    assert Pivotal(steps=steps, inversion_share=share).pivot == pivot


@pytest.mark.parametrize("method", METHODS)
def test_presets_are_recipes(method: str) -> None:
    measured = {} if method == "textual_inversion" else {"decoder_steps": 100, "objective": Objective(prior_weight=0.0)}
    assert RECIPE.validate_python(preset(method, "maquette"), strict=False) == METHODS[method](**measured)  # type: ignore[call-arg]
    for base, of_base in PRESETS.items():
        recipe = RECIPE.validate_python(preset(method, base), strict=False)
        assert (recipe.method, recipe.base) == (method, base)
        assert set(of_base) == set(METHODS)


def test_every_learning_rate_says_where_it_comes_from() -> None:
    for kind in (DreamBooth, Lora, TextualInversion, Pivotal):
        assert kind.model_fields["learning_rate"].description


def test_a_decoder_that_stays_as_it_is_leaves_no_trace_in_a_recipe() -> None:
    assert "decoder" not in Lora().model_dump_json()
    assert Lora(decoder_steps=100).digest != Lora().digest
    with pytest.raises(ValidationError, match="decoder_learning_rate is for a recipe with decoder_steps"):
        Lora(decoder_learning_rate=1e-3)
