"""What intake accepts: every limit and threshold as data, with the reason for its default.

Limits guard the machine; thresholds guard the model. A photo exactly at a limit is accepted.
"""

from __future__ import annotations

from pydantic import Field

from likeness.records import Record


class IntakePolicy(Record):
    """Limits and thresholds of intake. Lengths are pixels of the upright photo unless the name says otherwise."""

    # -- the set
    min_photos: int = Field(5, ge=1, le=1000, description="distinct usable photos of one person")
    held_out: int = Field(2, ge=1, le=3, description="witnesses: portraits that are never trained on, so that the gate has somebody to ask")
    max_photos: int = Field(200, ge=1, le=100_000, description="files looked at; the rest is refused by name")

    # -- the file
    max_file_bytes: int = Field(40 * 2**20, ge=1024, description="a 48 MP phone photo has 15 MB")
    max_megapixels: float = Field(100.0, gt=0, description="declared in the header, checked before a pixel is decoded")
    max_aspect: float = Field(5.0, gt=1, description="long side / short side; panoramas hold no usable face")
    decode_memory_mb: int = Field(600, ge=256, le=16_384, description="address space of the decoding child")
    decode_seconds: float = Field(10.0, gt=0, le=300, description="wall clock for one file in the decoding child")
    working_side_px: int = Field(2048, ge=512, le=8192, description="longer photos are reduced to this, so that work per photo is bounded")

    # -- the archive
    max_zip_bytes: int = Field(1 << 30, ge=1024, description="size of a zip given as source")
    max_zip_unpacked_bytes: int = Field(4 << 30, ge=1024, description="sum over all members, as really unpacked")
    max_depth: int = Field(200, ge=1, description="nested folders")

    # -- the picture
    min_side_px: int = Field(256, ge=1, description="short side")
    min_face_px: float = Field(80.0, ge=1, description="height of the face, brow to chin, about 2.3 eye distances")
    min_luma: float = Field(40.0, ge=0, le=255, description="mean luma of the face; below is too_dark")
    max_luma: float = Field(235.0, ge=0, le=255, description="mean luma of the face; above is too_bright")
    min_contrast: float = Field(12.0, ge=0, le=127, description="standard deviation of luma on the face")
    min_sharpness: float = Field(12.0, ge=0, description="variance of the Laplacian on a 128 px face crop: see models.faces.measure")
    min_face_inside: float = Field(0.9, ge=0, le=1, description="share of the face, brow to chin, that lies inside the photo")
    dominant_face: float = Field(2.0, ge=1, description="a bystander is tolerated if his face height is at most 1 / this of the main one")

    # -- the person, as shares of the recogniser's own distance at which two photos still show one person
    near_duplicate_bits: int = Field(6, ge=0, le=32, description="Hamming distance of two 64-bit perceptual hashes of the picture, mirrored or not")
    near_duplicate_likeness: float = Field(0.91, ge=0, le=1, description="correlation of two aligned faces, mirrored or not: copies 0.93 and more, "
                                           "different shots of one person at most 0.88 (1,600 pairs)")
    near_duplicate_distance: float = Field(0.42, gt=0, le=1, description="two copies of a shot are never further apart than this")
    stranger_distance: float = Field(0.75, gt=0, description="distance to the person's centre above which it is somebody else: of 1 to 4 strangers among 12 "
                                     "photos of rendered people 98.7 % are found, 0.4 % of the good photos are refused; at 1.0 only 47 % are found")
    majority: float = Field(0.6, gt=0.5, le=1, description="share of the shots that must be one person")
