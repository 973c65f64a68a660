"""Witnesses are whole photos: no crop of a held-out photo is trained on."""

from __future__ import annotations

import pytest

from likeness import digest
from likeness.records import BlobRef, Caption, CaptionSet, FaceMeasures, Portrait, PortraitSet
from tasks.preparing import assemble


def portrait(photo: int, framing: str, where: float) -> Portrait:
    sha = digest.of_bytes(f"{photo} {framing}".encode())
    blob = BlobRef(key=f"portraits/{sha}.png", sha256=sha, size=1, media="image/png")
    face = FaceMeasures(box_px=(10.0, 10.0, 90.0, 90.0), eye_distance_px=30.0, roll_deg=0.0, sharpness=20.0, score=1.0, visible=1.0)
    return Portrait.model_validate(dict(photo=digest.of_bytes(str(photo).encode()), crop=blob, mask=blob, side_px=128, framing=framing, face=face, embedding=(where, 0.0)))


@pytest.mark.parametrize("held_out", [1, 2])
def test_both_crops_of_a_witness_stay_out_of_training(held_out: int) -> None:
    # photos 3 and 4 lie nearest to the person's centre; every other photo has a wide crop too
    every = [portrait(n, framing, where=float(n)) for n in range(8) for framing in (("tight", "wide") if n % 2 else ("tight",))]
    captions = CaptionSet(captions=tuple(Caption(portrait=p.digest, text=f"photo {i}", source="slots") for i, p in enumerate(every)))
    made = assemble(PortraitSet(portraits=tuple(every)), captions, subject="a" * 64, noun="woman", trigger="zqaa", held_out=held_out)
    assert len(made.held_out) == held_out
    assert all(p.framing == "tight" for p in made.held_out)
    assert {p.photo for p in made.held_out} <= {digest.of_bytes(str(n).encode()) for n in (3, 4)}
    assert not {p.photo for p in made.held_out} & {p.photo for p in made.portraits}
    assert len(made.portraits) == len(every) - sum(p.photo in {w.photo for w in made.held_out} for p in every)
    assert [c.portrait for c in made.captions] == [p.digest for p in made.portraits]


def test_a_single_photo_leaves_no_witness() -> None:
    one = portrait(0, "tight", 0.0)
    captions = CaptionSet(captions=(Caption(portrait=one.digest, text="a photo", source="slots"),))
    made = assemble(PortraitSet(portraits=(one,)), captions, subject="a" * 64, noun="woman", trigger="zqaa", held_out=2)
    assert (len(made.portraits), len(made.held_out)) == (1, 0)
