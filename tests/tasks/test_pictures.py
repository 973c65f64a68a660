"""Pictures in the Store: what goes in comes out, and the same pixels are the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from likeness.store import MemoryStore
from tasks import pictures


@pytest.mark.parametrize("shape", [(64, 48, 3), (48, 64), (1, 1, 3)], ids=["colour", "mask", "one pixel"])
def test_pixels_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    store = MemoryStore()
    ref = pictures.put(store, "subjects/ada/photos", pixels)
    np.testing.assert_array_equal(pictures.get(store, ref), pixels)
    assert pictures.put(store, "subjects/ada/photos", pixels.copy()) == ref
    assert pictures.put(store, "subjects/ada/photos", np.asfortranarray(pixels)) == ref


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no PNG can be made of an array of shape \(4, 4, 2\)"):
        pictures.encode_png(np.zeros((4, 4, 2), np.uint8))
