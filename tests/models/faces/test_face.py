"""One head is one face, however often a detector sees it."""

from __future__ import annotations

import numpy as np
import pytest

from models.faces import align
from models.faces.dlib_faces import DlibFaces
from models.faces.face import Face, once_each

POINTS = align.template_in_crop(128)


@pytest.mark.parametrize(("boxes", "kept"), [
    ([], []),
    ([(37, 37, 94, 94), (30, 20, 78, 68)], [0]),            # seen on samples of the demo: 41 of 48 px across, 31 down
    ([(0, 0, 50, 50), (10, 10, 30, 30)], [0]),              # one within the other
    ([(0, 0, 50, 50), (30, 0, 80, 50)], [0, 1]),            # two heads, one before the other
    ([(0, 0, 50, 50), (60, 0, 110, 50)], [0, 1]),
    ([(0, 0, 50, 50), (20, 0, 70, 50), (40, 0, 90, 50)], [0, 2]),
    ([(5, 5, 5, 5), (0, 0, 50, 50)], [0, 1]),               # a box without an area shares nothing
], ids=["none", "two scales", "within", "overlap", "apart", "a chain", "empty box"])
def test_of_boxes_of_one_head_the_surer_is_kept(boxes: list[tuple[float, float, float, float]], kept: list[int]) -> None:
    faces = [Face(box, POINTS, 2.0 - 0.1 * i) for i, box in enumerate(boxes)]
    for order in (faces, faces[::-1]):
        assert once_each(order) == [faces[i] for i in kept]


def test_dlib_gives_one_face_for_a_head_that_it_found_twice() -> None:
    import dlib

    picture = np.full((128, 128, 3), 120, np.uint8)
    found = [(dlib.rectangle(37, 37, 94, 94), 1.6), (dlib.rectangle(30, 20, 78, 68), 0.3)]
    assert [f.score for f in DlibFaces()._faces(picture, picture, 1.0, found)] == [1.6]
    assert len(DlibFaces()._faces(picture, picture, 1.0, [found[0], (dlib.rectangle(0, 90, 30, 120), 0.3)])) == 2
