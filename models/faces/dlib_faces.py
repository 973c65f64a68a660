"""dlib, the embedded default: HOG, its CNN when HOG finds nothing, five points, ResNet 128-d. The networks come with a package from PyPI.

The models are public domain (CC0). The 68-point model of the same package is not used: it was trained on data for non-commercial use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from models.faces.face import SAME_PERSON_DISTANCE, Face, Metric, Picture, Vectors, inside, largest_first, once_each, scaled

HOG_SIDE_PX = 480        # HOG looks for faces of 80 px and more: pictures are scaled so that a face of a sixth of the long side is found (25 ms)
FAR_SIDE_PX = 1280       # where it finds none, faces of a sixteenth are looked for (170 ms): half-body and group photos
CNN_SIDE_PX = 360        # the CNN costs 1.5 s per megapixel on one core


@cache
def _networks() -> tuple[Any, Any, Any, Any, Any]:
    """(HOG, CNN, five points, recogniser, the library), read from the installed package once per process."""
    import dlib
    import face_recognition_models as files

    return (dlib.get_frontal_face_detector(), dlib.cnn_face_detection_model_v1(files.cnn_face_detector_model_location()),
            dlib.shape_predictor(files.pose_predictor_five_point_model_location()), dlib.face_recognition_model_v1(files.face_recognition_model_location()), dlib)


class DlibFaces:
    """Detector and recogniser of dlib."""

    name = "dlib"
    licence = "CC0"
    metric: Metric = "euclidean"         # vectors are not centred and not normalised
    same_person_distance = SAME_PERSON_DISTANCE

    def find_faces(self, picture: Picture) -> list[Face]:
        """HOG at two scales; the CNN at a smaller one when HOG finds nothing."""
        hog, cnn, _, _, _ = _networks()
        for side_px in (HOG_SIDE_PX, FAR_SIDE_PX):
            small, scale = scaled(picture, side_px)
            boxes, scores, _ = hog.run(small, 0, 0.0)
            found = [(b, float(s)) for b, s in zip(boxes, scores, strict=True)]
            if found or max(picture.shape[:2]) < HOG_SIDE_PX:      # enlarging a small picture further shows nothing new
                break
        if not found:
            small, scale = scaled(picture, CNN_SIDE_PX)
            found = [(d.rect, float(d.confidence)) for d in cnn(small, 0) if d.confidence > 0.6]
        return self._faces(picture, small, scale, found)

    def _faces(self, picture: Picture, small: Picture, scale: float, found: Sequence[tuple[Any, float]]) -> list[Face]:
        _, _, landmarks, _, _ = _networks()
        faces = []
        for box, score in found:
            points = np.array([[p.x, p.y] for p in landmarks(small, box).parts()], np.float64)
            edges = (box.left() / scale, box.top() / scale, box.right() / scale, box.bottom() / scale)
            faces.append(Face(inside(edges, picture), (points + 0.5) / scale - 0.5, score))
        return largest_first(once_each(faces))      # HOG finds one head at two scales now and then: both of 2 in 16 samples of the demo were that

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """(N, 128). The network reads its own 150 px chip, cut by its own five points."""
        _, _, _, recogniser, dlib = _networks()
        # dlib cuts the chip itself; a small picture is enlarged first, because its chip would be cut from too few pixels
        large, scale = scaled(picture, HOG_SIDE_PX) if max(picture.shape[:2]) < HOG_SIDE_PX else (np.ascontiguousarray(picture), 1.0)
        vectors = []
        for face in faces:
            points = [dlib.point(round(float(x)), round(float(y))) for x, y in (face.points + 0.5) * scale - 0.5]
            left, top, right, bottom = (round(v * scale) for v in face.box_px)
            shape = dlib.full_object_detection(dlib.rectangle(left, top, right, bottom), points)
            vectors.append(np.asarray(recogniser.compute_face_descriptor(large, shape), np.float32))
        return np.stack(vectors) if vectors else np.zeros((0, 128), np.float32)
