"""People as calibrations see them: who is left out, and that every photo is looked at in the fold in which it is unseen, with defects planted in some."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likeness.errors import InputError
from likeness.intake.policy import IntakePolicy
from models.captions.slots import SlotReader
from models.diffusion.bases import MAQUETTE
from models.faces.tools import dlib_tools
from models.maquette.companions import BANK_FOLDER
from models.quality import albums
from models.quality.albums import FEWEST, Album, look, read_albums
from models.quality.planting import CHECKERS, NAMES
from models.quality.unsafe import OpenNsfw


def test_too_few_people_are_refused_by_number(root: Path, tmp_path: Path) -> None:
    for name, count in (("ada", 2), ("bob", 1)):
        (tmp_path / name).mkdir()
        for file in sorted((root / "examples" / "demo").glob("*.jpg"))[:count]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    told: list[str] = []
    with pytest.raises(InputError, match=f"0 of 2 folders hold {FEWEST} usable photos of one person, 4 are needed"):
        read_albums(tmp_path, {}, faces=dlib_tools(), policy=IntakePolicy(), side_px=128, tell=lambda done, total, words: told.append(words))
    assert told[:2] == ["photos of ada", "photos of bob"]


def test_each_photo_is_looked_at_once_and_defects_are_planted_in_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(albums, "SPOILT", 1)
    monkeypatch.setattr(albums, "CHECKERS", {plant: CHECKERS[plant] for plant in ("erased face", "grid", "blur")})
    tools, names = dlib_tools(), [p["file"] for p in json.loads((BANK_FOLDER / "people.json").read_text())]

    def picture(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.asarray(Image.open(io.BytesIO((BANK_FOLDER / name).read_bytes())).convert("RGB").resize((128, 128)))

    made = []
    for n in range(2):
        crops = np.stack([picture(name) for name in names[4 * n:4 * n + 4]])
        made.append(Album(f"p{n}", "man", crops, np.random.default_rng(n).normal(0, 1, (4, 128)).astype(np.float32), None))
    found = look(made, faces=tools, reader=SlotReader.load(MAQUETTE / "weights" / "clip"), safety=OpenNsfw(), base="none", held_out=2, tell=lambda done, total, words: None)
    assert [f.album.name for f in found] == ["p0", "p1"]
    for one in found:
        assert len(one.seen) == len(one.answers) == 4
        assert len({s.image for s in one.seen}) == 4
        assert sum(s.faces == 1 for s in one.seen) >= 3
        assert one.spoilt.keys() == {"erased face", "grid", "blur"}
    planted = [(plant, s) for one in found for plant, every in one.spoilt.items() for s in every]
    assert len(planted) == 6
    assert all(s.faces == 0 and s.codes & NAMES["erased face"] for plant, s in planted if plant == "erased face")
    assert sum(bool(s.codes & NAMES[plant]) for plant, s in planted if plant != "erased face") >= 3
