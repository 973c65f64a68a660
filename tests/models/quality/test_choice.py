"""What scores a checkpoint: prompts that contradict the photos, few pictures, one witness; what cannot be measured is None."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from likeness.records import BatteryPrompt, BlobRef, Caption, FaceMeasures, Portrait
from likeness.settings import load_settings
from models.quality import measure
from models.quality.choice import FIRST_SEED, Sheet, contradictions, point, witnesses_for_choice

DIGEST = "0" * 64
SMILE = BatteryPrompt(category="expression", template="{who} smiling", slots={"expression": "smile"})
BEACH = BatteryPrompt(category="place", template="{who} in a red shirt on a beach", slots={"place": "beach", "colour": "red"})
PAINTING = BatteryPrompt(category="style", template="a painting of {who}", slots={"style": "painting"})
PLAIN = BatteryPrompt(category="plain", template="{who}")


def captions(*slots: dict[str, str]) -> list[Caption]:
    return [Caption(portrait=DIGEST, text="x", slots=named, source="slots") for named in slots]


@pytest.mark.parametrize(("slots", "asked"), [
    ([], [{"expression": "smile"}, {"place": "beach", "colour": "red"}, {}]),
    ([{}, {}], [{"expression": "smile"}, {"place": "beach", "colour": "red"}, {}]),
    ([{"expression": "smile"}, {"expression": "smile"}, {"expression": "neutral"}, {"colour": "blue"}], [{}, {"place": "beach", "colour": "red"}, {}]),
    ([{"expression": "smile", "place": "beach"}, {"expression": "neutral", "place": "park"}, {"place": "park"}], [{"expression": "smile"}, {"place": "beach", "colour": "red"}, {}]),
    ([{"expression": "smile", "place": "beach", "colour": "red"}], [{}, {}, {}]),
], ids=["no captions", "sidecar words name no slot", "most of them smile", "as many of each: the first in the alphabet", "the photos are what is asked"])
def test_what_contradicts_the_photos(slots: list[dict[str, str]], asked: list[dict[str, str]]) -> None:
    assert contradictions([SMILE, BEACH, PLAIN], captions(*slots)) == asked


def test_a_sheet_has_every_prompt_with_seeds_that_no_battery_has() -> None:
    sheet = Sheet.of([SMILE, PLAIN], captions({"expression": "smile"}), who="zqaa man", seeds=2)
    assert sheet.prompts == ("zqaa man smiling", "zqaa man smiling", "zqaa man", "zqaa man")
    assert sheet.seeds == tuple(FIRST_SEED + i for i in range(4))         # one seed is one composition, whatever the prompt
    assert sheet.asked == ({}, {}, {}, {})
    battery = load_settings().battery
    assert max(seed for _, seed in battery.model_copy(update={"seeds": 64}).every()) < FIRST_SEED


def test_of_several_witnesses_one_chooses() -> None:
    blob = BlobRef(key="k", sha256=DIGEST, size=1, media="image/png")
    face = FaceMeasures(box_px=(0.0, 0.0, 1.0, 1.0), eye_distance_px=1.0, roll_deg=0.0, sharpness=1.0, score=1.0, visible=1.0)
    held = tuple(Portrait(photo=str(i) * 64, crop=blob, mask=blob, side_px=8, framing="tight", face=face, embedding=(float(i),)) for i in range(3))
    for count in range(4):
        assert witnesses_for_choice(held[:count]) == held[:min(1, count)]


class Eyes:
    """Sees in a grey picture of value v so many faces as v says, and a vector of its own for each."""


    def __init__(self, faces: dict[int, int], vectors: dict[int, tuple[float, float]]) -> None:
        self.faces, self.vectors = faces, vectors

    def find_faces(self, picture: NDArray[np.uint8]) -> list[int]:
        return [0] * self.faces[int(picture[0, 0, 0])]

    def embed_faces(self, picture: NDArray[np.uint8], faces: object) -> NDArray[np.float32]:
        return np.array([self.vectors[int(picture[0, 0, 0])]], np.float32)

    def read(self, crops_NSSC: NDArray[np.uint8]) -> list[dict[str, tuple[str, float]]]:
        return [{"expression": ("smile" if crop[0, 0, 0] < 3 else "neutral", 0.9), "place": ("beach", 0.9), "style": ("photo", 0.9)} for crop in crops_NSSC]


IDENTITY = measure.Identity("eyes", "", witnesses=np.array([[0.0, 0.0]], np.float32), own=np.array([[0.0, 0.0], [0.0, 0.0]], np.float32),
                            impostors=np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], np.float32))      # floor 1, ceiling 0
SHEET = Sheet.of([SMILE, BEACH, PLAIN, PAINTING], [], who="zqaa man", seeds=1)
PICTURES = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (1, 2, 3, 4)])
ONE_FACE = dict.fromkeys((1, 2, 3, 4), 1)
NEAR = {1: (0.0, 0.0), 2: (0.5, 0.0), 3: (0.0, 2.0), 4: (9.0, 9.0)}


@pytest.mark.parametrize(("faces", "vectors", "identity"), [
    (ONE_FACE, NEAR, 0.5), (ONE_FACE | {4: 0}, NEAR, 0.5), (ONE_FACE | {1: 2}, NEAR, 0.5 / 3), (ONE_FACE | {1: 0, 2: 0}, NEAR, 0.0),
    (ONE_FACE, NEAR | {1: (math.nan, 0.0)}, 0.5 / 3), (ONE_FACE, dict.fromkeys(NEAR, (math.inf, math.nan)), 0.0),
], ids=["mean position", "a painting need not be anybody", "two faces are none", "no faces", "a vector of NaN is nobody", "all of them"])
def test_identity_is_the_mean_position_of_unstylised_pictures(faces: dict[int, int], vectors: dict[int, tuple[float, float]], identity: float) -> None:
    eyes = Eyes(faces, vectors)
    found = point(50, PICTURES, SHEET, IDENTITY, faces=eyes, reader=eyes)
    assert found.identity == pytest.approx(identity)
    assert found.obedience == pytest.approx(2 / 4)          # the smile and the beach; no red shirt, no painting
    assert (found.step, found.samples) == (50, 4)


@pytest.mark.parametrize("change", [
    {"witnesses": np.zeros((0, 2), np.float32)}, {"own": np.zeros((1, 2), np.float32)}, {"own": np.array([[5.0, 0.0], [-5.0, 0.0]], np.float32)},
    {"witnesses": np.array([[math.nan, 0.0]], np.float32)},
], ids=["no witness", "one portrait", "photos of two people", "a witness of NaN"])
def test_what_cannot_be_compared_is_not_measured(change: dict[str, NDArray[np.float32]]) -> None:
    eyes = Eyes(ONE_FACE, NEAR)
    assert point(50, PICTURES, SHEET, replace(IDENTITY, **change), faces=eyes, reader=eyes).identity is None


def test_without_anything_asked_against_the_photos_there_is_no_obedience() -> None:
    eyes = Eyes(ONE_FACE, NEAR)
    sheet = Sheet.of([PLAIN] * 4, [], who="zqaa man", seeds=1)
    assert point(50, PICTURES, sheet, IDENTITY, faces=eyes, reader=eyes).obedience is None
