"""insightface: SCRFD finds, an ArcFace-shaped network recognises, both .onnx files of a local folder read by `FaceAnalysis`.

insightface's published model packs are for non-commercial research only (`licence` says what is known of the files in use).

Which file is which is decided by insightface from the shapes of inputs and outputs; it is shown only files that are vouched for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from likeness import digest
from likeness.errors import RecipeError
from likeness.settings import InsightfaceWeights
from models.faces import align, weights
from models.faces.face import SAME_PERSON_DISTANCE, Face, Metric, Picture, Vectors, inside, largest_first

SETTING = "backends.insightface"
CANVAS_PX = 640                  # what SCRFD looks at; many of its files have no other input
# (border around the picture as a share of its long side, least score). SCRFD was trained on faces with much around them: without a border
# it finds 22 of 100 tight crops, with one all. Only where nothing is found the picture is looked at whole and twice as large, for small
# faces. Dogs score up to 0.62 (20 photos of one), people from 0.65 (154 photos); docs/log.md, 2026-11-25.
LOOKS = ((0.25, 0.63), (0.02, 0.65))
CHIP_PX = 112
CHIP_IOD_PX = 35.24              # eye distance in the chip that ArcFace networks are trained on: eyes at (56.0, 51.6) of 112 px


@cache
def _networks(folder: Path, files: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """{"detection": ..., "recognition": ...} of a pack, as far as it has them; read once per process.

    Raises:
        RecipeError: there is no detector among the files.
    """
    import onnxruntime
    from insightface.app import FaceAnalysis

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)      # ONNX Runtime does not read it; 0: every core
    with weights.private_copy(folder, dict(files)) as place:
        try:
            # static_shape_sessions would open the file again, later
            pack = FaceAnalysis(name=str(place), allowed_modules=["detection", "recognition"], providers=["CPUExecutionProvider"],
                                sess_options=options, static_shape_sessions=False)
        except Exception as e:      # AssertionError is how it says that it recognised no detector; ONNX Runtime has a dozen of its own
            raise RecipeError(f"{SETTING}.folder holds no face detector that insightface can read among {', '.join(n for n, _ in files)} "
                              f"({type(e).__name__}): put one there, for example SCRFD's det_10g.onnx") from e
        pack.prepare(ctx_id=-1, det_size=(CANVAS_PX, CANVAS_PX))
    networks: dict[str, Any] = pack.models
    return networks


class InsightFaces:
    """Detector and recogniser of one pack. Files are checked here, read on first use.

    Raises:
        RecipeError: no folder, no .onnx file in it.
        IntegrityError: a file is not what its hash says, or nobody vouches for any.
    """

    metric: Metric = "cosine"
    same_person_distance = SAME_PERSON_DISTANCE       # by construction: see `models.faces.face`

    def __init__(self, settings: InsightfaceWeights) -> None:
        names = [p.name for p in settings.folder.glob("*.onnx")] if settings.folder is not None else []
        self._settings = settings
        self._files, self._strange = weights.vouched(settings, names, setting=SETTING)
        if not self._files:
            raise weights.not_vouched(self._strange, needed=".onnx file", setting=SETTING)
        cosines = [weights.CATALOGUE[s].same_person_cosine for s in self._files.values() if s in weights.CATALOGUE]
        self.name = f"insightface-{digest.of_json({'files': self._files, 'cosine': settings.same_person_cosine or cosines})[:12]}"
        self.licence = weights.licence_of(self._files)

    def _network(self, task: str) -> Any:
        assert self._settings.folder is not None
        networks = _networks(self._settings.folder, tuple(self._files.items()))
        if task not in networks:
            raise weights.not_vouched(self._strange, needed=f"network for {task}", setting=SETTING)
        return networks[task]

    def find_faces(self, picture: Picture) -> list[Face]:
        """SCRFD on the picture with a border; without one, where that shows nothing."""
        detector = self._network("detection")
        bgr = np.ascontiguousarray(picture[..., ::-1])
        for border_rel, least in LOOKS:
            border = round(border_rel * max(picture.shape[:2])) + 1
            framed = cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_CONSTANT, value=(127, 127, 127))
            boxes, points = detector.detect(framed, det_thresh=least)
            if len(boxes):
                return largest_first([Face(inside(box[:4] - border, picture), align.corners_of(five.astype(np.float64) - border), float(box[4]))
                                      for box, five in zip(boxes, points, strict=True)])
        return []

    @cached_property
    def _length(self) -> float:
        """How long identity vectors are handed out: `models.faces.face`.

        Raises:
            RecipeError: nobody has measured this recogniser.
        """
        known = self._files.get(Path(self._network("recognition").model_file).name, "")
        measured = weights.CATALOGUE[known].same_person_cosine if known in weights.CATALOGUE else None
        cosine = measured if self._settings.same_person_cosine is None else self._settings.same_person_cosine
        if cosine is None:
            raise RecipeError(f"Likeness has not measured this recogniser of {SETTING}.folder: the cosine from which on two photos show one person is needed; "
                              f"measure it with `make bench-faces BENCH_ARGS='--insightface FOLDER --cosine 0.3'` and state it as {SETTING}.same_person_cosine")
        return float(SAME_PERSON_DISTANCE / np.sqrt(2 * (1 - cosine)))

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """(N, D), all of one length, so that Euclidean distance is monotone in cosine."""
        recogniser, length = self._network("recognition"), self._length
        if not faces:
            return np.zeros((0, int(recogniser.output_shape[-1])), np.float32)
        bgr = np.ascontiguousarray(picture[..., ::-1])
        vectors = np.concatenate([np.asarray(recogniser.get_feat(chip(bgr, face)), np.float32) for face in faces])      # some files take one at a time
        return np.asarray(length * vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def chip(picture: Picture, face: Face) -> Picture:
    """The (112, 112, 3) cut that ArcFace networks read, from anybody's five points.

    Likeness's own crop has the eyes at 0.43 of its height and in the middle: of one 120 px wide the columns 4 to 116 and the first 112 rows
    have them at (56.0, 51.6), which is ArcFace's template to 0.1 px.
    """
    wide = align.crop(picture, align.fit(face.points), side_px=CHIP_PX + 8, side_iod=(CHIP_PX + 8) / CHIP_IOD_PX)
    return np.ascontiguousarray(wide[:CHIP_PX, 4:4 + CHIP_PX])
