"""Bytes in, upright 8-bit sRGB pixels out, decoded in a child process that may die.

The child is started once, answers one file after the other, and is killed and started again when it hangs or crashes. What comes back
was rebuilt from pixels: no metadata, no trailing data, no second picture survives.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from likeness.errors import ResourceError
from likeness.intake.policy import IntakePolicy
from likeness.intake.reasons import Refusal

CHILD = Path(__file__).with_name("decoder_child.py")
START_SECONDS = 60.0       # imports on a very busy machine; a file's own clock starts after them
MAX_HEADER_BYTES = 65_536

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_FOREIGN = ((b"GIF8", "a GIF"), (b"PK\x03\x04", "a zip archive"), (b"PK\x05\x06", "an empty zip archive"), (b"%PDF", "a PDF"), (b"8BPS", "a Photoshop file"),
            (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000"), (b"\xff\x0a", "a JPEG XL"), (b"\x00\x00\x00\x0cJXL ", "a JPEG XL"), (b"Rar!", "a RAR archive"),
            (b"7z\xbc\xaf", "a 7z archive"), (b"\x1f\x8b", "a gzip archive"), (b"\x00\x00\x01\x00", "an icon"), (b"\x1aE\xdf\xa3", "a video"))


@dataclass(frozen=True)
class Decoded:
    """An upright picture and what had to be changed to make it one."""

    pixels: NDArray[np.uint8]        # (H, W, 3) sRGB
    changes: tuple[str, ...]         # empty: used as it was
    declared_px: tuple[int, int]     # width, height in the file


def sniff(data: bytes) -> str | Refusal:
    """The format by content, never by name: "JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "BMP", or why it is none."""
    if not data:
        return Refusal("empty_file", "the file is empty: copy or download it again")
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[i:i + 4] for i in range(16, size, 4))}
        if data[8:12] in _AVIF_BRANDS or (brands & _AVIF_BRANDS and data[8:12] not in _HEIF_BRANDS - {b"mif1", b"msf1"}):
            return "AVIF"
        if brands & _HEIF_BRANDS:
            return "HEIF"
        return Refusal("unsupported_format", "this is a video or an unknown relative of HEIC: use JPEG, PNG, WebP, HEIC, AVIF, TIFF or BMP")
    if data[:4] in (b"II*\x00", b"MM\x00*"):
        return "TIFF"
    if data[:2] == b"BM" and len(data) >= 26:
        return "BMP"
    for magic, name in _FOREIGN:
        if data.startswith(magic):
            return Refusal("unsupported_format", f"this is {name}: use JPEG, PNG, WebP, HEIC, AVIF, TIFF or BMP")
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<svg", b"<?xml", b"<!doctype", b"<html")):
        return Refusal("unsupported_format", "this is a drawing or a web page, not a photo: use JPEG, PNG, WebP, HEIC, AVIF, TIFF or BMP")
    return Refusal("not_an_image", "the content of this file is no picture: copy or download it again, or take it out of the folder")


class _Gone(Exception):
    """The child hung up."""


class Decoder:
    """Decodes files in a confined child process. Use as a context manager; not for several threads at once."""

    def __init__(self, policy: IntakePolicy | None = None) -> None:
        self.policy = policy or IntakePolicy()
        self._child: subprocess.Popen[bytes] | None = None
        self.restarts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def decode(self, data: bytes) -> Decoded | Refusal:
        """The picture in `data`, or why there is none.

        Raises:
            ResourceError: if no child process can be started.
        """
        if len(data) > self.policy.max_file_bytes:
            return Refusal("too_large_bytes", f"{len(data) / 2**20:.0f} MB, at most {self.policy.max_file_bytes / 2**20:.0f} MB: save a smaller copy")
        kind = sniff(data)
        if isinstance(kind, Refusal):
            return kind
        limits = {name: getattr(self.policy, name) for name in ("max_megapixels", "min_side_px", "max_aspect", "working_side_px")}
        options = json.dumps({"kind": kind, **limits}).encode()
        child = self._ready_child()
        deadline = time.monotonic() + self.policy.decode_seconds
        try:
            self._send(child, struct.pack(">I", len(options)) + options + struct.pack(">I", len(data)), data, deadline=deadline)
            header = json.loads(self._receive(child, self._length(child, deadline), deadline))
            if not header["ok"]:
                return Refusal(header["reason"], header["message"])
            width, height = int(header["width"]), int(header["height"])
            pixels = self._receive(child, width * height * 3, deadline)
        except TimeoutError:
            self._replace()
            return Refusal("corrupt", f"decoding took longer than {self.policy.decode_seconds:g} s: export the photo again as JPEG")
        except (_Gone, ValueError, KeyError, TypeError):
            self._replace()
            return Refusal("corrupt", "the picture made its decoder fail: export the photo again as JPEG")
        return Decoded(np.frombuffer(pixels, np.uint8).reshape(height, width, 3), tuple(header["changes"]), tuple(header["declared"]))

    def _replace(self) -> None:
        self.close()
        self.restarts += 1

    def _ready_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        try:
            child = subprocess.Popen([sys.executable, "-I", str(CHILD), str(self.policy.decode_memory_mb)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.DEVNULL, bufsize=0, close_fds=True, env={"PATH": os.defpath})
        except OSError as e:
            raise ResourceError(f"no process could be started to decode photos ({e.strerror}): free memory or processes and run the same command again") from e
        self._child = child
        assert child.stdin is not None and child.stdout is not None
        os.set_blocking(child.stdin.fileno(), False)
        os.set_blocking(child.stdout.fileno(), False)
        try:
            self._receive(child, 1, time.monotonic() + START_SECONDS)
        except (_Gone, TimeoutError) as e:
            self.close()
            raise ResourceError("the process that decodes photos does not start: run `likeness doctor`, and check that Pillow, pillow-heif and OpenCV are installed") from e
        return child

    @staticmethod
    def _wait(fd: int, event: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(fd, event)
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError

    def _send(self, child: subprocess.Popen[bytes], *parts: bytes, deadline: float) -> None:
        assert child.stdin is not None
        fd = child.stdin.fileno()
        for part in parts:
            view = memoryview(part)
            while view:
                self._wait(fd, select.POLLOUT, deadline)
                try:
                    view = view[os.write(fd, view[:1 << 20]):]
                except BlockingIOError:
                    continue
                except OSError as e:
                    raise _Gone from e

    def _receive(self, child: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
        assert child.stdout is not None
        fd, got = child.stdout.fileno(), bytearray()
        while len(got) < size:
            self._wait(fd, select.POLLIN, deadline)
            try:
                part = os.read(fd, min(size - len(got), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise _Gone
            got += part
        return bytes(got)

    def _length(self, child: subprocess.Popen[bytes], deadline: float) -> int:
        size = int(struct.unpack(">I", self._receive(child, 4, deadline))[0])
        if size > MAX_HEADER_BYTES:
            raise ValueError("header too long")
        return size
