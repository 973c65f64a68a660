"""What pages and registries show of samples: those judged unsafe, or not judged for that, are covered, all others are as they are."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from likeness.records import Finding, Sample, SampleScore, SampleSet
from likeness.store import MemoryStore
from tasks import pictures
from tasks.registering import sample_grid
from tasks.reporting import COVERED, shown

UNSAFE = Finding(code="unsafe", score=0.9, threshold=0.5, box_px=(0.0, 0.0, 96.0, 64.0))
NOISE = np.random.default_rng(5).integers(0, 256, (64, 96, 3), np.uint8)


def score(*findings: Finding, image: str = "a" * 64) -> SampleScore:
    return SampleScore(image=image, category="plain", faces=1, identity_distance=0.3, position=0.8, nearest_training=0.2, findings=findings)


@pytest.mark.parametrize("findings", [(UNSAFE,), (Finding(code="blur", score=-2.0, threshold=-1.0), UNSAFE), (Finding(code="unmeasured", of="unsafe"),)],
                         ids=["unsafe", "unsafe and blurred", "could not be judged"])
def test_what_may_not_be_seen_is_a_few_squares_of_colour(findings: tuple[Finding, ...]) -> None:
    seen = shown(NOISE, score(*findings))
    assert (seen.shape, seen.dtype) == (NOISE.shape, np.uint8)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) <= COVERED ** 2
    np.testing.assert_allclose(seen.mean((0, 1)), NOISE.mean((0, 1)), atol=2)


@pytest.mark.parametrize("judged", [None, score(), score(Finding(code="blur", score=-2.0, threshold=-1.0), Finding(code="unmeasured", of="grid"))],
                         ids=["not judged yet", "clean", "other findings"])
def test_everything_else_is_shown_as_it_is(judged: SampleScore | None) -> None:
    np.testing.assert_array_equal(shown(NOISE, judged), NOISE)


def test_the_grid_of_a_release_covers_them_too() -> None:
    store = MemoryStore()
    refs = [pictures.put(store, "subjects/ada/samples", np.roll(NOISE, n, axis=0)) for n in range(3)]
    samples = SampleSet(adapter="a" * 64, battery="b" * 64, samples=tuple(Sample(adapter="a" * 64, prompt="p", category="plain", seed=n, image=ref) for n, ref in enumerate(refs)))
    tools: Any = SimpleNamespace(store=store)
    grid = np.asarray(Image.open(io.BytesIO(sample_grid(tools, samples.samples, [score(image=refs[0].sha256), score(UNSAFE, image=refs[1].sha256), score(image=refs[2].sha256)]))))
    tiles = [grid[:, 96 * n:96 * (n + 1)] for n in range(3)]
    np.testing.assert_array_equal(tiles[0], NOISE)
    np.testing.assert_array_equal(tiles[1], shown(np.roll(NOISE, 1, axis=0), score(UNSAFE)))
    np.testing.assert_array_equal(tiles[2], np.roll(NOISE, 2, axis=0))
