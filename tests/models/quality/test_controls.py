"""Negative controls through the real recogniser, the real bank and the real gate: each refused, each for its right reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from likeness.gate import GatePolicy, judge
from likeness.records import Verdict
from models.faces import align
from models.faces.tools import FaceTools, dlib_tools
from models.maquette.companions import read_bank, read_class_pictures
from models.quality.measure import References, Seen, measure, thumbnail

pytestmark = pytest.mark.timeout(300)
Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def tools() -> FaceTools:
    return dlib_tools()


def portraits(folder: Path, tools: FaceTools) -> tuple[list[Picture], NDArray[np.float32]]:
    crops, vectors = [], []
    for path in sorted(folder.glob("*.jpg"))[:12]:
        photo = np.asarray(Image.open(path).convert("RGB"))
        face = tools.main_face(photo)
        if face is not None:
            crops.append(align.crop(photo, align.fit(face.points), side_px=128))
            vectors.append(tools.embed_faces(photo, [face])[0])
    return crops, np.stack(vectors)


@pytest.fixture(scope="module")
def demo(root: Path, tools: FaceTools) -> tuple[list[Picture], NDArray[np.float32]]:
    return portraits(root / "examples" / "demo", tools)


def verdict(samples: Sequence[Picture], demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools, *, training: slice) -> Verdict:
    crops, vectors = demo
    seen = []
    for number, image in enumerate(samples):
        faces = tools.find_faces(image)
        seen.append(Seen(f"{number:064x}", "plain", len(faces), tools.embed_faces(image, faces)[0] if len(faces) == 1 else None, thumbnail(image)))
    references = References(witnesses=vectors[:2], own=vectors, impostors=read_bank().embeddings, training=np.stack([thumbnail(c) for c in crops[training]]))
    return judge(measure(seen, references, backend="dlib", bank=read_bank().digest), GatePolicy())


def codes(found: Verdict) -> set[str]:
    return {r.code for r in found.reasons}


def test_other_photos_of_the_person_pass(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools) -> None:
    # Not a control but its mirror: a gate that refuses the person's own unseen pictures would be a wall.
    found = verdict(demo[0][2:], demo, tools, training=slice(0, 2))
    assert found.kind == "accepted", found.reasons


def test_noise_is_refused_for_its_missing_faces(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools) -> None:
    rng = np.random.default_rng(0)
    found = verdict([rng.integers(0, 255, (128, 128, 3), dtype=np.uint8) for _ in range(10)], demo, tools, training=slice(2, None))
    assert found.kind == "retry"
    assert "faces" in codes(found)


def test_training_photos_handed_in_as_samples_are_refused_as_copies(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools) -> None:
    edited = [np.clip(c.astype(np.int16) + 6, 0, 255).astype(np.uint8) for c in demo[0][2:]]
    for samples in (demo[0][2:], edited):
        found = verdict(samples, demo, tools, training=slice(2, None))
        assert found.kind == "retry"
        assert codes(found) == {"copies"}


def test_the_base_alone_is_refused_for_identity(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools) -> None:
    # An adapter of zero steps draws what the base draws.
    pictures, _ = read_class_pictures("man", side_px=128)
    found = verdict(list(pictures[:16]), demo, tools, training=slice(2, None))
    assert found.kind == "retry"
    assert "identity" in codes(found)


def test_pictures_of_somebody_else_are_refused_for_identity(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools, rendered_users: Path) -> None:
    # The best that another user's adapter could draw: that user.
    found = verdict(portraits(rendered_users / "900008", tools)[0], demo, tools, training=slice(2, None))
    assert found.kind == "retry"
    assert codes(found) == {"identity"}
