"""What a base can keep of a person, and what was measured with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likeness.acceptance import ENOUGH_ROWS, Fit, Prospect
from likeness.settings import load_settings
from models.diffusion import bases
from models.diffusion.bases import Base
from models.faces import align
from models.faces.tools import dlib_tools
from models.quality import prospects


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.load("maquette")


def test_what_ships_is_of_what_ships(base: Base) -> None:
    """A changed recipe, policy or base leaves `inspect` without an estimate until `python -m bench.acceptance --ship` has measured it."""
    settings = load_settings()
    backend = dlib_tools().recogniser_name
    trials = prospects.trials_for(settings, backend)
    assert trials is not None
    assert trials.revision == base.ref.revision
    assert len(trials.rows) >= ENOUGH_ROWS
    fit = Fit(trials.rows)
    likely = [fit.estimate(Prospect(photos=8, kept=kept), date="").accepted for kept in (0.3, 0.4, 0.5, 0.6, 0.7)]
    assert likely == sorted(likely, reverse=True)          # the more of a face the base loses, the less likely
    assert likely[-1] < 0.2                                # as far as real people's photos lie, none was accepted
    assert prospects.trials_for(settings, "another") is None
    for other in ({"recipe.steps": 199}, {"gate.min_identity_share": 0.41}, {"battery.seeds": 3}, {"sampling.steps": 19}):
        assert prospects.trials_for(load_settings(overrides=other), backend) is None, other


def test_kept_is_further_than_the_photos_themselves_and_nothing_is_kept_of_noise(base: Base, root: Path) -> None:
    faces = dlib_tools()
    crops, vectors = [], []
    for file in sorted((root / "examples" / "demo").glob("*.jpg"))[:4]:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        face = faces.main_face(pixels)
        assert face is not None
        crops.append(align.crop(pixels, align.fit(face.points), side_px=base.ref.resolution_px))
        vectors.append(faces.embed_faces(pixels, [face])[0])
    own = np.stack(vectors)
    found = prospects.kept(base, np.stack(crops), own, faces)
    apart = float(np.median([np.linalg.norm(own[i] - np.delete(own, i, axis=0).mean(0)) for i in range(len(own))]))
    assert found is not None
    assert apart < found < 0.6
    assert found == prospects.kept(base, np.stack(crops), own, faces)
    noise = np.random.default_rng(0).integers(0, 256, (2, base.ref.resolution_px, base.ref.resolution_px, 3), dtype=np.uint8)
    assert prospects.kept(base, noise, own[:2], faces) is None
