"""Negative controls through the real recogniser, the real bank and the real gate: each refused, each for its right reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from likeness.gate import GatePolicy, judge
from likeness.recipe import RECIPE, Recipe, preset
from likeness.records import Verdict
from likeness.settings import load_settings
from models.diffusion import bases
from models.diffusion.bases import Base
from models.diffusion.batches import TrainingInputs, encode
from models.diffusion.decoder import DecoderStep, decoder_plan
from models.diffusion.loop import Job, fit
from models.diffusion.methods import adapted, step_of, train
from models.diffusion.sampler import sample
from models.faces import align
from models.faces.tools import FaceTools, dlib_tools
from models.maquette.companions import read_bank, read_base_scores, read_class_pictures
from models.quality.measure import Identity, References, Seen, measure, thumbnail

pytestmark = pytest.mark.timeout(1800)
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


def verdict(samples: Sequence[Picture], demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools, *, training: slice,
            categories: Sequence[str] | None = None) -> Verdict:
    crops, vectors = demo
    seen = []
    for number, image in enumerate(samples):
        faces = tools.find_faces(image)
        seen.append(Seen(f"{number:064x}", categories[number] if categories else "plain", len(faces), tools.embed_faces(image, faces)[0] if len(faces) == 1 else None, thumbnail(image)))
    base = read_base_scores("man", revision=bases.reference("maquette").revision, battery=load_settings().battery.digest)
    references = References(Identity("dlib", read_bank().digest, vectors[:2], vectors, read_bank().embeddings), np.stack([thumbnail(c) for c in crops[training]]), base=base)
    return judge(measure(seen, references), GatePolicy())


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


def test_pictures_of_somebody_else_are_refused_for_identity(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools, rendered_users: Path) -> None:
    # The best that another user's adapter could draw: that user.
    found = verdict(portraits(rendered_users / "900008", tools)[0], demo, tools, training=slice(2, None))
    assert found.kind == "retry"
    assert codes(found) == {"identity"}


def shipped() -> Recipe:
    """The recipe of `make demo`: decoder and all."""
    return RECIPE.validate_python(preset("lora", "maquette"), strict=False)


def drawn(base: Base, tensors: dict[str, Tensor], recipe: Recipe) -> tuple[list[Picture], list[str]]:
    """The whole default battery with an adapter, as the stage `sample` draws it; and the samples' categories."""
    settings = load_settings()
    wanted = settings.battery.every()
    with adapted(base, tensors, recipe):
        images = sample(base, [p.text(f"{base.trigger} man") for p, _ in wanted], [s for _, s in wanted], steps=settings.sampling.steps,
                        guidance=settings.sampling.guidance)
    return list(images), [p.category for p, _ in wanted]


def inputs(base: Base, crops: list[Picture], tools: FaceTools) -> TrainingInputs:
    class_images, class_captions = read_class_pictures("man", side_px=128)
    return encode(base, crops_NSSC=np.stack(crops), masks_NSS=np.stack([tools.face_mask(c) for c in crops]),
                  captions=[f"a photo of a {base.trigger} man"] * len(crops), class_images_MSSC=class_images, class_captions=class_captions, noun="man")


def test_an_adapter_of_zero_steps_is_refused_for_identity(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools) -> None:
    base, recipe = bases.load("maquette"), shipped()
    material = inputs(base, demo[0][2:], tools)
    method = step_of(base, material, recipe)
    untrained = method.export()
    method.close()
    [decoder] = fit([Job("decoder", lambda: DecoderStep(base, material, recipe), decoder_plan(recipe))])        # the decoder alone makes nobody of a stranger
    untrained |= decoder.tensors
    images, categories = drawn(base, untrained, recipe)
    found = verdict(images, demo, tools, training=slice(2, None), categories=categories)
    assert found.kind == "retry"
    assert "identity" in codes(found)
    assert "copies" not in codes(found)


def test_an_adapter_of_another_user_is_refused_for_identity(demo: tuple[list[Picture], NDArray[np.float32]], tools: FaceTools, rendered_users: Path) -> None:
    other = portraits(rendered_users / "900010", tools)
    base, recipe = bases.load("maquette"), shipped()
    trained = train("other", base, inputs(base, other[0][2:10], tools), recipe)
    assert trained.error is None
    images, categories = drawn(base, trained.tensors, recipe)
    found = verdict(images, demo, tools, training=slice(2, None), categories=categories)
    assert found.kind == "retry"
    assert codes(found) == {"identity"}
    # and not because it draws nobody: to its own witnesses it is nearer by far
    own = verdict(images, other, tools, training=slice(2, 10), categories=categories)
    assert own.scores["identity_position"] > found.scores["identity_position"] + 0.2
