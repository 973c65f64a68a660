"""Why a file, or a set, is not used: every code there is, in the words of its owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# code -> what it means. A code here is a public name: tests, reports and other programs match on it.
PHOTO_REASONS: Mapping[str, str] = {
    # the file
    "not_a_photo": "system litter, a side-car or a document: not counted as a photo",
    "not_a_regular_file": "a link, folder, pipe, socket or device under the name of a photo: never opened",
    "unreadable": "the file may not be read, or is encrypted",
    "unsafe_path": "the name leads out of the folder, or is too deep",
    "empty_file": "no bytes",
    "too_large_bytes": "more bytes than any photo",
    "too_many_files": "more files than are looked at",
    # the format
    "not_an_image": "the content is no picture, whatever the name says",
    "unsupported_format": "a picture or archive in a format that is not read",
    "animated": "several pictures in one file",
    "truncated": "the picture ends too early",
    "corrupt": "the picture is damaged",
    "metadata_bomb": "metadata that unpacks to more than any photo holds",
    # the size
    "too_many_pixels": "more pixels than are decoded",
    "too_small": "fewer pixels than a face needs",
    "bad_aspect": "a strip",
    # the picture
    "too_dark": "the face, or everything, is nearly black",
    "too_bright": "the face, or everything, is nearly white",
    "low_contrast": "nothing stands out",
    "not_a_photograph": "a drawing, an edge map or a screenshot",
    # the face
    "no_face": "no face was found",
    "several_faces": "several faces, none of which dominates",
    "face_too_small": "the face has too few pixels to learn from",
    "face_cut_off": "the face leaves the picture",
    "face_occluded": "something covers the face, or it was pixelated",
    "too_blurry": "the face is out of focus or shaken",
    # the set
    "duplicate": "the same bytes as another file",
    "near_duplicate": "the same shot as another file, re-encoded, resized, mirrored or cropped",
    "identity_mismatch": "somebody other than the person on most photos",
}

SET_REASONS: Mapping[str, str] = {
    "no_usable_photo": "not one photo can be used",
    "too_few_photos": "fewer photos than a person can be learned from",
    "too_few_distinct_photos": "enough files, but too few different shots",
    "ambiguous_identity": "no person is on most of the photos",
}


@dataclass(frozen=True)
class Refusal:
    """One reason why one file is not used; `ignored` for files that were never meant as photos."""

    reason: str
    message: str
    ignored: bool = False

    def __post_init__(self) -> None:
        if self.reason not in PHOTO_REASONS:
            raise ValueError(f"{self.reason!r} is no reason code: add it to PHOTO_REASONS")
