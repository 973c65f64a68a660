"""Advice on a set: what it lacks, and what nearly every photo of it shares."""

from __future__ import annotations

import pytest

from likeness.intake.sets import Look, advise

# Views, framing and light that leave nothing to wish for
VARIED = [(0.0, 0.3, 90.0), (0.3, 0.5, 130.0), (-0.3, 0.4, 160.0), (0.05, 0.35, 110.0), (0.1, 0.6, 150.0), (-0.2, 0.3, 100.0), (0.2, 0.45, 140.0), (0.0, 0.5, 120.0)]


def looks(*shows: dict[str, str], count: int = 8) -> list[Look]:
    return [Look(turn, face, luma, True, shows[i % len(shows)] if shows else {}) for i, (turn, face, luma) in enumerate(VARIED[:count])]


def test_a_varied_set_has_nothing_to_wish_for() -> None:
    assert advise(looks({"hat": "none", "place": "beach"}, {"hat": "fedora", "place": "park"})) == ()


@pytest.mark.parametrize(("shows", "word"), [
    ({"hat": "beanie"}, "a hat is on nearly every photo: add two without it"),
    ({"eyewear": "sunglasses"}, "glasses of one kind"),
    ({"expression": "smile"}, "expression is the same"),
    ({"garment": "suit"}, "clothes are of one kind"),
    ({"place": "office"}, "same kind of place"),
])
def test_what_nearly_every_photo_shares_is_named(shows: dict[str, str], word: str) -> None:
    (said,) = advise(looks(shows))
    assert word in said


@pytest.mark.parametrize("shows", [[{"hat": "none"}], [{"eyewear": "none"}], [{"hat": "beanie"}, {}], [{"hat": "beanie"}, {"hat": "fedora"}]],
                         ids=["no hat", "no glasses", "not sure of half", "two kinds"])
def test_what_is_no_habit_is_not(shows: list[dict[str, str]]) -> None:
    assert advise(looks(*shows)) == ()


def test_few_photos_say_nothing_about_habits() -> None:
    (few,) = advise(looks({"hat": "beanie"}, count=4))
    assert "4 photos are few" in few
