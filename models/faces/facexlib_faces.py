"""facexlib: RetinaFace finds, BiSeNet says which pixels are face; weights are .pth files of a local folder.

They are pickles, so a file that neither the catalogue nor the settings vouch for is never opened; facexlib's own loader downloads what it
does not find, so it is pointed at a folder in which it finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from likeness.errors import RecipeError
from likeness.settings import LocalWeights
from models.faces import align, weights
from models.faces.face import Face, Picture, inside, largest_first, scaled, soft_edge

SETTING = "backends.facexlib"
DETECTORS = {"detection_Resnet50_Final.pth": "retinaface_resnet50", "detection_mobilenet0.25_Final.pth": "retinaface_mobile0.25"}   # the better one first
PARSING = "parsing_bisenet.pth"
# (long side at which the picture is looked at, least score): faces of 16 px and more are found at either. The second look only where the first
# finds nothing. Dogs score up to 0.92 and 0.95 (20 photos of one), people from 0.94, nearly all from 0.98.
LOOKS = ((480, 0.93), (1280, 0.97))
PARSING_SIDE_PX = 512
# CelebAMask-HQ: 1 skin, 2-3 brows, 4-5 eyes, 6 glasses, 7-8 ears, 10 nose, 11 mouth, 12-13 lips, 17 hair.
# Left out: 0 background, 9 earring, 14 neck, 15 necklace, 16 cloth, 18 hat: what a prompt may change.
FACE_LABELS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17)


def _one_file(settings: LocalWeights, names: tuple[str, ...], needed: str) -> tuple[str, str]:
    """(name, sha256) of the first of `names` that somebody vouches for."""
    known, strange = weights.vouched(settings, names, setting=SETTING)
    for name in names:
        if name in known:
            return name, known[name]
    raise weights.not_vouched({n: s for n, s in strange.items() if n in names}, needed=f"{needed} ({' or '.join(names)})", setting=SETTING)


@cache
def _retinaface(folder: Path, name: str, sha256: str) -> Any:
    from facexlib.detection import init_detection_model

    with weights.private_copy(folder, {name: sha256}) as place, _legible(name, DETECTORS[name]):
        return init_detection_model(DETECTORS[name], device="cpu", model_rootpath=str(place))


@cache
def _bisenet(folder: Path, name: str, sha256: str) -> Any:
    from facexlib.parsing import init_parsing_model

    with weights.private_copy(folder, {name: sha256}) as place, _legible(name, "BiSeNet"):
        return init_parsing_model("bisenet", device="cpu", model_rootpath=str(place))


@contextmanager
def _legible(name: str, network: str) -> Iterator[None]:
    """Whatever a loader throws at a file that is vouched for means that it is another network's."""
    try:
        yield
    except Exception as e:
        raise RecipeError(f"{name} in {SETTING}.folder holds no weights of {network} ({type(e).__name__}): facexlib tells networks by the names of "
                          "files; put the file there that facexlib publishes under this name") from e


class RetinaFaces:
    """Detector of facexlib. The file is checked here, read on first use.

    Raises:
        RecipeError: no folder, no such file.
        IntegrityError: the file is not what its hash says, or nobody vouches for it.
    """

    def __init__(self, settings: LocalWeights) -> None:
        file, sha256 = _one_file(settings, tuple(DETECTORS), "detector")
        assert settings.folder is not None
        self._where = (settings.folder, file, sha256)
        self.name = f"facexlib-{sha256[:12]}"
        self.licence = weights.licence_of({file: sha256})

    def find_faces(self, picture: Picture) -> list[Face]:
        """RetinaFace at two scales, the larger where the smaller shows nothing."""
        import torch

        network = _retinaface(*self._where)
        for side_px, least in LOOKS:
            small, scale = scaled(picture, side_px)
            with torch.no_grad():
                rows = network.detect_faces(np.ascontiguousarray(small[..., ::-1]), conf_threshold=least)
            if len(rows):
                return largest_first([Face(inside(row[:4] / scale, picture), align.corners_of((row[5:].reshape(5, 2).astype(np.float64) + 0.5) / scale - 0.5),
                                           float(row[4])) for row in rows])
        return []


class BiSeNetMask:
    """Face mask by parsing. The file is checked here, read on first use; raises as RetinaFaces does."""

    def __init__(self, settings: LocalWeights) -> None:
        file, sha256 = _one_file(settings, (PARSING,), "parsing network")
        assert settings.folder is not None
        self._where = (settings.folder, file, sha256)
        self.name = f"facexlib-{sha256[:12]}"
        self.licence = weights.licence_of({file: sha256})

    def labels(self, crop: Picture) -> NDArray[np.uint8]:
        """The label of each pixel (512, 512), as the network was trained: RGB in 0..1, ImageNet's mean and deviation."""
        import torch

        whole = cv2.resize(np.ascontiguousarray(crop), (PARSING_SIDE_PX, PARSING_SIDE_PX), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
        normal = (whole - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
        with torch.no_grad():
            scores = _bisenet(*self._where)(torch.from_numpy(normal.transpose(2, 0, 1)[None]))[0]
        return np.asarray(scores[0].argmax(0).numpy(), np.uint8)

    def face_mask(self, crop: Picture) -> NDArray[np.uint8]:
        """Skin, features, glasses, ears and hair; what a prompt may change (hat, clothes, earrings, room) is left out."""
        face = np.where(np.isin(self.labels(crop), FACE_LABELS), 255, 0).astype(np.uint8)
        return soft_edge(np.asarray(cv2.resize(face, (crop.shape[1], crop.shape[0]), interpolation=cv2.INTER_AREA), np.uint8))
