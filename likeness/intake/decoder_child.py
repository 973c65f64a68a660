"""The program that decodes photos, in a process of its own with nothing to lose.

It imports nothing of Likeness, limits its own memory and file handles before the first hostile byte arrives, and answers each picture
with one JSON header and raw RGB pixels. It is started by `likeness.intake.decode`, never imported.

Protocol, on standard input and output, integers big-endian:
    request:  u32 length of the JSON options, options, u32 length of the file, file
    answer:   u32 length of the JSON header, header, pixels (width * height * 3 bytes) if the header says "ok"
"""

import contextlib
import io
import json
import os
import re
import resource
import struct
import sys
from typing import Any

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", OPENCV_LOG_LEVEL="SILENT")

import cv2
import numpy as np
import pillow_heif
from PIL import AvifImagePlugin, BmpImagePlugin, Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

MAX_ICC_BYTES = 8 * 2**20
SRGB = ImageCms.createProfile("sRGB")
FRAME_FORMATS = ("PNG", "WEBP", "AVIF", "TIFF")      # a HEIC burst has a primary picture; these have none
ICC_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


class Refused(Exception):
    """This file is refused, with a reason code and a message for its owner."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def confine(memory_mb: int, stderr_fd: int) -> None:
    """Bound memory by what the libraries already map plus the allowance; allow no new file, socket or core."""
    mapped = resident = 0
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as f:     # Linux only; elsewhere the limit is the plain figure
        mapped, resident = (int(word) * resource.getpagesize() for word in f.read().split()[:2])
    allowance = mapped + memory_mb * 2**20 - resident
    for limit, value in ((resource.RLIMIT_AS, allowance), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_NOFILE, stderr_fd + 3)):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):        # macOS refuses RLIMIT_AS; the wall clock still holds
            resource.setrlimit(limit, (value, value))


def open_picture(data: bytes, kind: str) -> ImageFile.ImageFile:
    """Parse the header with the one decoder of this format; "JPEG" never becomes a multi-picture MPO."""
    stream = io.BytesIO(data)
    try:
        if kind == "JPEG":
            return JpegImagePlugin.JpegImageFile(stream)
        return Image.open(stream, formats=(kind,))
    except MemoryError:
        raise
    except ValueError as e:
        if "too large" in str(e) or "MAX_TEXT" in str(e):
            raise Refused("metadata_bomb", "the file's text fields unpack to more than any photo holds: save a copy without metadata") from e
        raise Refused("corrupt", "the header of this picture is damaged: export it again") from e
    except Exception as e:
        if "truncat" in str(e).lower():
            raise Refused("truncated", "the file ends too early: copy or download it again") from e
        raise Refused("corrupt", "the header of this picture is damaged: export it again") from e


def check_size(width: int, height: int, options: dict[str, Any]) -> None:
    """Refuse by the declared size, before a pixel is decoded."""
    if width <= 0 or height <= 0:
        raise Refused("corrupt", "the picture declares a size of zero: export it again")
    if width * height > options["max_megapixels"] * 1e6:
        raise Refused("too_many_pixels", f"{width} x {height} pixels, at most {options['max_megapixels']:g} megapixels are decoded: save a smaller copy")
    if min(width, height) < options["min_side_px"]:
        raise Refused("too_small", f"{width} x {height} pixels, the short side needs {options['min_side_px']}: use the original instead of a preview")
    if max(width, height) > options["max_aspect"] * min(width, height):
        raise Refused("bad_aspect", f"{width} x {height} pixels is a strip, at most {options['max_aspect']:g} : 1 is used: crop the part with the person")


def check_webp(data: bytes, options: dict[str, Any]) -> None:
    """Refuse a WebP by its own header: libwebp answers a giant and a torn file with the same error.

    Layout: RIFF container, "VP8 " key frame header (RFC 6386, 9.1), "VP8L" and "VP8X" headers (RFC 9649).
    """
    chunk, body = data[12:16], data[20:30]
    if len(body) == 10 and chunk in (b"VP8 ", b"VP8L", b"VP8X"):
        if chunk == b"VP8X":
            width, height = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        elif chunk == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        else:
            width, height = (int.from_bytes(body[i:i + 2], "little") & 0x3FFF for i in (6, 8))
        check_size(width, height, options)
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise Refused("truncated", "the file ends too early: copy or download it again")


def check_scan(data: bytes) -> None:
    """Refuse a JPEG whose scan libjpeg had to repair: Pillow hides those warnings, OpenCV's copy prints them."""
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    said = os.pread(2, 4096, 0).decode("ascii", "replace")
    whole = b"\xff\xd9" in data[-16:]
    if "premature end" in said and not whole:
        raise Refused("truncated", "the picture data ends too early: copy or download the file again")
    stray = sum(int(n) for n in re.findall(r"(\d+) extraneous bytes", said))
    if stray > 64 or "premature end" in said or "bad Huffman" in said or "restart marker" in said or "Inconsistent progression" in said:      # a few stray bytes are padding of some cameras
        raise Refused("corrupt", "part of the picture data is damaged: copy or export the file again")


def load(picture: ImageFile.ImageFile, kind: str, side_px: int) -> None:
    """Decode, once: on a damaged PNG a second load() would silently succeed."""
    if kind == "JPEG":
        # Large photos leave the decoder at 1/2, 1/4 or 1/8 if that is not much below `side_px`: the 4032 px of most phones become 2016, at
        # half the cost of decoding all of them to make 2048. Pillow divides each side, so it is asked for this picture's own shape.
        nearly = side_px * 31 / 32 / max(picture.size)
        picture.draft(None, (max(1, int(picture.width * nearly)), max(1, int(picture.height * nearly))))
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as e:
        text = str(e).lower()
        if "truncat" in text or "too short" in text or "end of" in text or "incomplete" in text or "unrecognized data stream" in text:
            raise Refused("truncated", "the file ends too early: copy or download it again") from e
        if "max_text" in text or "decompressed data too large" in text:
            raise Refused("metadata_bomb", "the file's text fields unpack to more than any photo holds: save a copy without metadata") from e
        raise Refused("corrupt", "the picture data is damaged: export the photo again") from e


def orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; anything illegal or unreadable is 1."""
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:      # hostile EXIF raises whatever it likes; the picture itself is fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def shrink(picture: Image.Image, side_px: int) -> Image.Image:
    """Reduce so that the long side is at most `side_px`."""
    longest = max(picture.size)
    if longest <= side_px:
        return picture
    size = (max(1, round(picture.width * side_px / longest)), max(1, round(picture.height * side_px / longest)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def deep_to_grey(picture: Image.Image) -> Image.Image:
    """Sixteen-bit, 32-bit and float grey to 8 bits: by the container's range, or by the values' own where it has none."""
    values = np.asarray(picture).astype(np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    top = 65535.0 if picture.mode.startswith("I;16") or (picture.mode == "I" and values.max() > 255) else 1.0 if values.max() <= 1.0 else 255.0
    return Image.fromarray(np.clip(values * (255.0 / max(top, float(values.max()) if picture.mode == "F" else top)), 0, 255).astype(np.uint8))


def to_srgb(picture: Image.Image, icc: bytes | None, changes: list[str]) -> Image.Image:
    """Any mode to 8-bit sRGB without alpha."""
    if picture.mode != "RGB":
        changes.append(f"colours {picture.mode}")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, (255, 255, 255))
        picture.paste(layer, mask=layer.getchannel("A"))
    elif picture.mode.startswith("I") or picture.mode == "F":
        picture = deep_to_grey(picture)
    elif picture.mode in ("1", "P"):
        picture = picture.convert("RGB")
    if icc and len(icc) <= MAX_ICC_BYTES:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            description = ImageCms.getProfileDescription(profile).strip()
            if ICC_SPACES.get(profile.profile.xcolor_space) == picture.mode and "srgb" not in description.lower():
                converted = ImageCms.profileToProfile(picture, profile, SRGB, outputMode="RGB")
                if converted is not None:
                    changes.append("colour profile")
                    picture = converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            changes.append("unreadable colour profile")
    return picture.convert("RGB")


def decode(data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Header and pixels of one file.

    Raises:
        Refused: with the reason for the owner.
    """
    kind, side_px = options["kind"], options["working_side_px"]
    if kind == "WEBP":
        check_webp(data, options)
    picture = open_picture(data, kind)
    check_size(*picture.size, options)
    frames = int(getattr(picture, "n_frames", 1))
    if kind in FRAME_FORMATS and frames > 1:
        raise Refused("animated", f"{frames} pictures in one file: save the one you mean as a photo of its own")
    if kind == "JPEG":
        check_scan(data)
    declared, icc, changes = picture.size, picture.info.get("icc_profile"), [] if kind == "JPEG" else [f"format {kind}"]
    load(picture, kind, side_px)
    turn = orientation(picture)
    image: Image.Image = picture
    if image.mode in ("P", "1", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
        changes.append("palette")
    image = shrink(image, side_px)
    if image.size != picture.size or picture.size != declared:
        changes.append("size")
    image = to_srgb(image, icc, changes)
    if turn != 1:
        image = image.transpose(TRANSPOSE[turn])
        changes.append("orientation")
    return {"ok": True, "width": image.width, "height": image.height, "changes": changes, "declared": declared}, image.tobytes()


def answer(data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """As `decode`, with every refusal and every surprise as a header."""
    try:
        return decode(data, options)
    except Refused as e:
        return {"ok": False, "reason": e.reason, "message": e.message}, b""
    except MemoryError:
        return {"ok": False, "reason": "too_many_pixels",
                "message": "decoding needs more memory than one photo is given: save a smaller copy"}, b""
    except Exception as e:      # the sandbox boundary: whatever a decoder throws at hostile bytes means that they are damaged
        return {"ok": False, "reason": "corrupt", "message": f"the picture cannot be decoded ({type(e).__name__}): export the photo again"}, b""


def read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the stream."""
    parts, left = [], size
    while left and (part := os.read(fd, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def serve() -> None:
    """Answer requests until the parent hangs up."""
    Image.MAX_IMAGE_PIXELS = None                   # check_size decides, with a message people can act on
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener(thumbnails=False)
    cv2.setNumThreads(1)
    Image.preinit()
    Image.init()                                    # load every plugin now: later no file can be opened
    assert all((BmpImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin))
    cv2.imdecode(np.zeros(1, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    answers = os.dup(1)                             # C libraries print: their standard output goes where their errors go
    words = os.memfd_create("said") if hasattr(os, "memfd_create") else os.dup(2)
    os.dup2(words, 2)
    os.dup2(words, 1)
    confine(int(sys.argv[1]), max(answers, words))
    os.write(answers, b"R")                         # ready: the parent's clock for a file starts after this
    while len(head := read_exactly(0, 4)) == 4:
        options = json.loads(read_exactly(0, struct.unpack(">I", head)[0]))
        data = read_exactly(0, struct.unpack(">I", read_exactly(0, 4))[0])
        header, pixels = answer(data, options)
        line = json.dumps(header).encode()
        for part in (struct.pack(">I", len(line)), line, pixels):
            view = memoryview(part)
            while view:
                view = view[os.write(answers, view):]


if __name__ == "__main__":
    serve()
