"""Pictures in the Store: PNG blobs in, uint8 arrays out, and back."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from likeness.records import BlobRef
from likeness.store import Store, put_blob, read_blob


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of (H, W, 3) RGB or (H, W) grey; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def put(store: Store, folder: str, pixels: NDArray[np.uint8]) -> BlobRef:
    """Store pixels as a PNG blob."""
    return put_blob(store, folder, encode_png(pixels), media="image/png")


def get(store: Store, ref: BlobRef) -> NDArray[np.uint8]:
    """The verified pixels of a PNG blob that Likeness wrote."""
    with Image.open(io.BytesIO(read_blob(store, ref)), formats=["PNG"]) as picture:
        return np.asarray(picture)


def stack(store: Store, refs: Sequence[BlobRef]) -> NDArray[np.uint8]:
    """Equal-sized pictures as one array (N, H, W[, 3])."""
    return np.stack([get(store, ref) for ref in refs])
