"""The ladder: written recipes first, then the rule for what failed, never the same twice, always an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness import gate
from likeness.gate import GatePolicy
from likeness.ladder import MOST, RULES, Attempt, best, differences, next_step
from likeness.recipe import METHODS, RECIPE, DreamBooth, Lora, Objective, Pivotal, Recipe, TextualInversion, preset
from likeness.records import Finding, Measurements, Reason, SampleScore, Verdict

NONE, DOP = Objective(prior_weight=0.0), Objective(prior="dop")           # the maquette's presets keep no class; a recipe of the class alone has class pictures


def verdict(*codes: str, kind: str = "retry", identity: float | None = 0.2) -> Verdict:
    return Verdict(kind=kind, reasons=tuple(Reason(code=c, message=f"{c} is not what it must be") for c in codes), scores={"identity_share": identity},
                   measured="a" * 64, policy="b" * 64)


def attempt(recipe: Recipe, *codes: str, identity: float | None = 0.2, kind: str = "retry") -> Attempt:
    return Attempt(recipe, verdict(*codes, identity=identity, kind=kind), "")


def after(*attempts: Attempt, ladder: tuple[Recipe, ...] = ()) -> Any:
    step = next_step(attempts, ladder)
    assert step.recipe is not None, step.why
    return step.recipe


RECIPES = st.one_of(
    st.builds(lambda method, base: RECIPE.validate_python(preset(method, base), strict=False), st.sampled_from(sorted(METHODS)), st.sampled_from(["maquette", "sd15", "sdxl"])),
    st.builds(lambda steps, rank, weight, prior: Lora(steps=steps, rank=rank, alpha=float(rank), objective=Objective(prior_weight=weight, prior=prior)),
              st.integers(1, 20_000), st.integers(1, 256), st.sampled_from([0.0, 0.25, 3.0]), st.sampled_from(["class_pictures", "dop"])),
    st.builds(lambda steps: Pivotal(steps=steps), st.integers(1, 20_000)))
VERDICTS = st.builds(lambda codes, share: verdict(*codes, identity=share), st.lists(st.sampled_from([*RULES, "of_tomorrow"]), max_size=4, unique=True),
                     st.one_of(st.none(), st.floats(0, 1)))


@settings(max_examples=30, deadline=None)
@given(RECIPES, st.lists(RECIPES, max_size=3), st.lists(VERDICTS, min_size=MOST, max_size=MOST))
def test_it_ends_never_repeats_is_deterministic_and_takes_written_recipes_first(first: Recipe, ladder: list[Recipe], verdicts: list[Verdict]) -> None:
    attempts = [Attempt(first, verdicts[0], "")]
    for judged in verdicts[1:]:
        step = next_step(attempts, ladder)
        assert step == next_step(list(attempts), tuple(ladder))
        assert step.why
        if step.recipe is None:
            break
        tried = {a.recipe.digest for a in attempts}
        assert step.recipe.digest not in tried
        assert step.recipe.base in {first.base, *(r.base for r in ladder)}
        written = [r for r in ladder if r.digest not in tried]
        assert not written or step.recipe == written[0]
        assert RECIPE.validate_json(step.recipe.model_dump_json()) == step.recipe
        attempts.append(Attempt(step.recipe, judged, step.why))
    step = next_step(attempts, ladder)
    assert len(attempts) < MOST or (step.recipe is None and f"more than {MOST} are never" in step.why)


def test_the_rules_alone_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likeness.ladder.MOST", 10_000)
    attempts = [attempt(Lora(), "identity")]
    while (step := next_step(attempts, ())).recipe is not None:
        assert len(attempts) < 50
        attempts.append(attempt(step.recipe, "identity", identity=0.2))
    assert "no rule has a recipe that was not tried" in step.why
    assert {a.recipe.method for a in attempts} == {"lora", "pivotal"}
    assert max(a.recipe.steps for a in attempts if a.recipe.method == "lora") <= 800
    assert max(a.recipe.rank for a in attempts if isinstance(a.recipe, Lora | Pivotal)) <= 64


@pytest.mark.parametrize(("recipe", "code", "expected", "words"), [
    (Lora(), "identity", Lora(steps=400), "steps 400 (was 200), because identity is not"),
    (Lora(steps=800), "identity", Lora(steps=800, rank=32, alpha=32.0), "rank 32 (was 16), alpha 32 (was 16)"),
    (Lora(steps=800, rank=64), "identity", Pivotal(steps=1200, rank=64), "pivotal instead of lora"),
    (Lora(steps=800, rank=64, min_rank=8), "identity", Pivotal(steps=1200, rank=64, min_rank=8), "pivotal instead of lora"),
    (Lora(), "copies", Lora(steps=100), "steps 100 (was 200), because copies is not"),
    (Lora(steps=50), "copies", Lora(steps=50, objective=Objective(prior_weight=0.5)), "prior weight 0.5 (was 0.25)"),
    (Lora(steps=50, objective=NONE), "copies", Lora(steps=50, objective=Objective(prior="dop", prior_weight=1.0)), "prior dop (was class_pictures), prior weight 1 (was 0)"),
    (Lora(objective=NONE), "diversity", Lora(), "prior weight 0.25 (was 0)"),
    (Lora(objective=Objective(prior="dop", prior_weight=0.0)), "diversity", Lora(), "prior class_pictures (was dop), prior weight 0.25 (was 0)"),
    (Lora(objective=NONE), "drift", Lora(objective=Objective(prior="dop", prior_weight=1.0)), "prior dop"),
    (DreamBooth(steps=50), "faces", DreamBooth(steps=50, learning_rate=1.5e-4), "learning rate 0.00015 (was 0.0003)"),
    (TextualInversion(), "copies", TextualInversion(steps=100), "steps 100"),
    (TextualInversion(steps=800, vectors=7), "identity", Pivotal(vectors=7, decoder_steps=100, objective=NONE), "pivotal instead of textual_inversion"),
    (Lora(steps=800, rank=64, objective=DOP), "identity", Pivotal(steps=1200, rank=64, objective=DOP), "pivotal instead of lora"),
    (Lora(objective=DOP), "drift", Lora(objective=Objective(prior="dop", prior_weight=0.5)), "prior weight 0.5 (was 0.25)"),
    (DreamBooth(steps=800, objective=Objective(caption_dropout=0.2)), "identity", Pivotal(objective=Objective(caption_dropout=0.2)), "pivotal instead of dreambooth"),
    (Lora(), "defects", Lora(learning_rate=1.5e-3), "learning rate 0.0015 (was 0.003), because defects is not"),
    (Lora(), "diversity", Lora(objective=Objective(prior="dop")), "prior dop"),
    (Lora(objective=Objective(prior="dop", prior_weight=4.0)), "diversity", Lora(objective=Objective(prior="dop", prior_weight=4.0, caption_dropout=0.1)), "caption dropout 0.1 (was 0)"),
    (Lora(learning_rate=0.024), "faces", Lora(), "learning rate 0.003 (was 0.024), because faces is not"),
    (Lora(learning_rate=0.012), "diversity", Lora(), "learning rate 0.003 (was 0.012)"),
    (Lora(learning_rate=1e-3), "diversity", Lora(learning_rate=1e-3, objective=Objective(prior="dop")), "prior dop"),
    (Lora(steps=12), "identity", Lora(), "steps 200 (was 12), because identity is not"),
    (Lora(steps=1000), "copies", Lora(), "steps 200 (was 1000), because copies is not"),
    (Lora(), "editability", Lora(steps=100), "steps 100"),
], ids=lambda value: value if isinstance(value, str) else getattr(value, "method", None))
def test_what_failed_decides_what_changes(recipe: Recipe, code: str, expected: Recipe, words: str) -> None:
    step = next_step([attempt(recipe, code)], ())
    assert step.recipe == expected
    assert words in step.why


def test_a_training_that_went_too_far_is_shortened_before_one_that_is_too_weak_is_lengthened() -> None:
    assert after(attempt(Lora(), "identity", "faces")) == Lora(steps=100)


def test_a_training_shorter_than_the_preset_that_draws_whole_faces_has_not_gone_too_far() -> None:
    assert after(attempt(Lora(steps=12), "identity", "diversity", "editability")) == Lora()
    assert after(attempt(Lora(steps=12), "identity", "faces")) == Lora(steps=12, learning_rate=1.5e-3)
    assert after(attempt(Lora(steps=100, learning_rate=0.01), "identity", "diversity")) == Lora(steps=100)
    assert after(attempt(Lora(steps=100), "identity", "diversity"), attempt(Lora(), "faces", identity=0.1)) == Lora(steps=100, objective=Objective(prior="dop"))


def test_between_too_few_and_too_many_lies_the_middle() -> None:
    few, many = attempt(Lora(), "identity", identity=0.2), attempt(Lora(steps=400), "copies", identity=0.6)
    middle = after(few, many)
    assert middle == Lora(steps=300)
    assert after(attempt(Lora(steps=400), "copies", identity=0.1), attempt(Lora(), "identity", identity=0.2)) == middle
    assert after(few, many, attempt(middle, "copies", identity=0.5)).steps == 400      # goes on at the best one, with the next change


def test_alike_samples_are_answered_with_class_pictures_and_then_with_output_preservation() -> None:
    first, second = attempt(Lora(objective=NONE), "diversity"), attempt(Lora(), "diversity")
    assert after(first, second) == Lora(objective=Objective(prior="dop", prior_weight=1.0))          # goes on at the first, which is as good
    assert after(first, attempt(Lora(), "diversity", identity=0.6)) == Lora(objective=DOP)


def test_what_did_not_help_is_left_and_the_best_goes_on() -> None:
    good, worse = attempt(Lora(), "identity", identity=0.35), attempt(Lora(steps=400), "identity", identity=0.1)
    assert after(good, worse) == Lora(rank=32, alpha=32.0)


def test_written_recipes_come_in_their_order_then_the_rules() -> None:
    ladder = (Lora(seed=1), Lora(), Pivotal())
    first = attempt(Lora(), "identity")
    step = next_step([first], ladder)
    assert step.recipe == ladder[0]
    assert "entry 1 of `ladder`" in step.why
    assert "identity is not what it must be" in step.why
    second = attempt(Lora(seed=1), "identity")
    assert after(first, second, ladder=ladder) == Pivotal()                            # the one between was the first attempt
    assert after(first, second, attempt(Pivotal(), "identity"), ladder=ladder) == Lora(steps=400)


@pytest.mark.parametrize("kind", ["accepted", "needs_photos", "rejected"])
def test_only_retry_has_a_next_recipe(kind: str) -> None:
    step = next_step([attempt(Lora(), "x", kind=kind)], (Lora(seed=1),))
    assert step.recipe is None
    assert kind in step.why
    assert next_step([], (Lora(),)).recipe is None


def test_a_reason_without_a_rule_proposes_nothing() -> None:
    assert next_step([attempt(Lora(), "of_tomorrow")], ()).recipe is None


def test_every_retry_of_the_gate_has_a_rule() -> None:
    score = SampleScore(image="a" * 64, category="plain", faces=2, identity_distance=None, position=None, nearest_training=None, findings=(Finding(code="blur"),))
    judged = gate.judge(Measurements(backend="dlib", bank="b", threshold=0.4, ceiling=0.2, floor=0.6, usable_portraits=8, scores=(score,) * 8), GatePolicy())
    assert judged.kind == "retry"
    assert {r.code for r in judged.reasons} == {"faces", "identity", "copies", "defects"} <= set(RULES)
    assert {"editability", "diversity", "drift"} <= set(RULES)      # tests/likeness/test_gate.py has them refuse


def test_the_first_accepted_counts_or_else_the_most_recognisable() -> None:
    refused = [attempt(Lora(seed=i), "identity", identity=share) for i, share in enumerate((0.2, None, 0.3, 0.3))]
    assert best(refused) == 2
    assert best([*refused, attempt(Lora(), kind="accepted", identity=0.1), attempt(Lora(), kind="accepted", identity=0.9)]) == 4
    with pytest.raises(ValueError, match="empty"):
        best([])


def test_differences_are_named() -> None:
    assert differences(Lora(), Lora()) == "nothing"
    assert differences(Lora(), Lora(targets=("attention",))) == "targets attention (was attention, convolution)"


def test_where_nothing_is_recognised_yet_the_nearer_attempt_is_the_better_one() -> None:
    """Otherwise a ladder that begins at nothing would go on from its first recipe for ever."""
    near, far = (Attempt(Lora(steps=steps), verdict("identity", identity=0.0).model_copy(update={"scores": {"identity_share": 0.0, "identity_position": position}}), "")
                 for steps, position in ((400, 0.12), (200, 0.07)))
    assert best([far, near]) == 1
    assert after(far, near).steps == 800
    assert best([near, near]) == 0
    assert best([far, attempt(Lora(steps=100), "identity", identity=0.1)]) == 1
