"""What stages need of faces, and which network does it: one detector, one recogniser, one mask, chosen independently by settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from likeness.settings import Backends
from models.faces import align
from models.faces.clarity import ClarityReader
from models.faces.dlib_faces import DlibFaces
from models.faces.face import Face, FaceDetector, FaceEmbedder, FaceParser, Picture, Vectors, soft_edge
from models.faces.facexlib_faces import BiSeNetMask, RetinaFaces
from models.faces.insightface_faces import InsightFaces


class EllipseMask:
    """The ellipse of face and hair line: alignment says where it lies."""

    name = "ellipse"
    licence = "Apache-2.0, no weights"

    def face_mask(self, crop: Picture) -> NDArray[np.uint8]:
        """(S, S) of an aligned crop (S, S, 3)."""
        side = crop.shape[0]
        unit = side / align.TIGHT_SIDE_IOD
        mask = np.zeros((side, side), np.uint8)
        centre = (round(side / 2), round(align.EYE_LINE_REL * side + 0.35 * unit))
        cv2.ellipse(mask, centre, (round(1.35 * unit), round(1.95 * unit)), 0, 0, 360, 255, -1)
        return soft_edge(mask)


DETECTORS: Mapping[str, Callable[[Backends], FaceDetector]] = {
    "dlib": lambda b: DlibFaces(), "insightface": lambda b: InsightFaces(b.insightface), "facexlib": lambda b: RetinaFaces(b.facexlib),
}
EMBEDDERS: Mapping[str, Callable[[Backends], FaceEmbedder]] = {
    "dlib": lambda b: DlibFaces(), "insightface": lambda b: InsightFaces(b.insightface),
}
PARSERS: Mapping[str, Callable[[Backends], FaceParser]] = {
    "ellipse": lambda b: EllipseMask(), "facexlib": lambda b: BiSeNetMask(b.facexlib),
}


@dataclass(frozen=True)
class FaceTools:
    """What stages need of faces: one detector, one recogniser, the mask."""

    detector: FaceDetector
    embedder: FaceEmbedder
    parser: FaceParser
    clarity: ClarityReader = field(default_factory=ClarityReader)
    second_embedder: FaceEmbedder | None = None

    @property
    def second(self) -> FaceTools | None:
        """The same detector with the second recogniser; None where one alone votes."""
        return None if self.second_embedder is None else replace(self, embedder=self.second_embedder, second_embedder=None)

    @property
    def recogniser_name(self) -> str:
        """What decides an identity vector: who cut the face out, and who looked at it. Vectors of two such names are never compared."""
        return "/".join(dict.fromkeys((self.detector.name, self.embedder.name)))

    @property
    def name(self) -> str:
        """What decides every result: networks and weights. Part of the key of every stage that looks at faces."""
        return f"{self.recogniser_name}/{self.parser.name}"

    @property
    def licence(self) -> str:
        """Who may use these networks: each licence once."""
        networks = (self.detector, self.embedder, self.parser, *((self.second_embedder,) if self.second_embedder is not None else ()))
        return "; ".join(dict.fromkeys(network.licence for network in networks))

    @property
    def same_person_distance(self) -> float:
        """Distance up to which two photos show one person."""
        return self.embedder.same_person_distance

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

    def embed_portraits(self, crops: Sequence[Picture]) -> Vectors:
        """Identity vectors (P, D) of aligned crops (S, S, 3). Where the detector sees not exactly one face, the points are where the alignment put them."""
        return np.stack([np.asarray(self.embed_faces(crop, [self._only_face(crop)])[0], np.float32) for crop in crops])

    def _only_face(self, crop: Picture) -> Face:
        faces = self.find_faces(crop)
        return faces[0] if len(faces) == 1 else Face((0.0, 0.0, float(crop.shape[1]), float(crop.shape[0])), align.template_in_crop(crop.shape[0]), 0.0)

    def face_mask(self, crop: Picture) -> NDArray[np.uint8]:
        """(S, S) of an aligned crop (S, S, 3): 255 is face, with a soft edge."""
        return self.parser.face_mask(crop)

    def sharpness(self, crop: Picture) -> float:
        """Variance of the Laplacian of the face at 128 px: `IntakePolicy.min_sharpness` says what is usable."""
        unit = crop.shape[0] / align.TIGHT_SIDE_IOD
        cx, cy, r = crop.shape[1] / 2, align.EYE_LINE_REL * crop.shape[0] + 0.4 * unit, 1.3 * unit
        face = crop[max(0, round(cy - r)):round(cy + r), max(0, round(cx - r)):round(cx + r)]
        grey = cv2.resize(cv2.cvtColor(np.ascontiguousarray(face), cv2.COLOR_RGB2GRAY), (128, 128), interpolation=cv2.INTER_AREA)
        return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def face_tools(backends: Backends) -> FaceTools:
    """The chosen networks. Files of weights are checked now and read on first use.

    Raises:
        RecipeError: a folder or a file is not there.
        IntegrityError: a file is not what its sha256 says, or nobody vouches for it.
    """
    second = None if backends.second_identity is None else EMBEDDERS[backends.second_identity](backends)
    return FaceTools(DETECTORS[backends.detect](backends), EMBEDDERS[backends.identity](backends), PARSERS[backends.mask](backends), second_embedder=second)


def dlib_tools() -> FaceTools:
    """The embedded default."""
    return face_tools(Backends())
