"""Photos are decoded in a child that may die; the parent may not."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from likeness.intake.decode import Decoded, Decoder, sniff
from likeness.intake.policy import IntakePolicy
from likeness.intake.reasons import PHOTO_REASONS, Refusal


def picture(width: int = 320, height: int = 280) -> Image.Image:
    """A colourful picture whose four corners differ."""
    y, x = np.mgrid[:height, :width]
    red = 255.0 * x / width
    green = 255.0 * y / height
    blue = 127 + 100 * np.sin(x / 17) * np.cos(y / 23)
    return Image.fromarray(np.stack([red, green, blue], 2).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(out, quality=90)
    return out.getvalue()


def seeds() -> dict[str, bytes]:
    """Ten files, one of each kind that is read."""
    base = picture()
    return {
        "jpeg": encoded(base, "JPEG", quality=85),
        "progressive": encoded(base, "JPEG", quality=85, progressive=True),
        "cmyk": encoded(base.convert("CMYK"), "JPEG"),
        "png": encoded(base, "PNG"),
        "palette": encoded(base.convert("P"), "PNG"),
        "webp": encoded(base, "WEBP"),
        "avif": encoded(base, "AVIF", speed=10),
        "tiff": encoded(base, "TIFF", compression="tiff_lzw"),
        "bmp": encoded(base, "BMP"),
        "heic": heic(),
    }


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as made:
        yield made


def got(found: Decoded | Refusal) -> Decoded:
    assert isinstance(found, Decoded), found
    return found


@pytest.mark.parametrize("name", sorted(seeds()))
def test_every_format_comes_out_as_srgb_pixels(decoder: Decoder, name: str) -> None:
    decoded = got(decoder.decode(seeds()[name]))
    assert decoded.pixels.shape == (280, 320, 3) and decoded.pixels.dtype == np.uint8
    if name != "palette":
        assert np.abs(decoded.pixels.astype(float) - np.asarray(picture(), float)).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "YCbCr", "LAB", "F"])
def test_every_colour_mode(decoder: Decoder, mode: str) -> None:
    grey = picture().convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "LAB":
        converted = ImageCms.profileToProfile(picture(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
        assert converted is not None
        image = converted
    else:
        image = picture().convert(mode)
    data = encoded(image, "TIFF" if mode in ("F", "LAB", "CMYK", "YCbCr") else "PNG")
    decoded = got(decoder.decode(data))
    assert decoded.pixels.shape == (280, 320, 3)
    luma = np.asarray(Image.fromarray(decoded.pixels).convert("L").resize((32, 28), Image.Resampling.BOX), float)     # a bitmap is dithered
    assert np.abs(luma - np.asarray(grey.resize((32, 28), Image.Resampling.BOX), float)).mean() < 8


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(decoder: Decoder, form: str, value: int) -> None:
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    turned = picture().transpose(back[value]) if value in back else picture()
    exif = Image.Exif()
    exif[0x0112] = value
    decoded = got(decoder.decode(encoded(turned, form, exif=exif, quality=90) if form != "TIFF" else encoded(turned, form, exif=exif)))
    assert decoded.pixels.shape == (280, 320, 3)
    assert np.abs(decoded.pixels.astype(float) - np.asarray(picture(), float)).mean() < 8


def test_a_colour_profile_is_applied_and_a_foreign_one_ignored(decoder: Decoder) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    decoded = got(decoder.decode(encoded(picture(), "PNG", icc_profile=lab)))
    assert np.array_equal(decoded.pixels, np.asarray(picture()))
    broken = got(decoder.decode(encoded(picture(), "PNG", icc_profile=os.urandom(5000))))
    assert np.array_equal(broken.pixels, np.asarray(picture()))


def test_large_photos_are_reduced(decoder: Decoder) -> None:
    decoded = got(decoder.decode(encoded(picture(6000, 4000), "JPEG")))
    assert decoded.pixels.shape == (1365, 2048, 3) and decoded.declared_px == (6000, 4000)


@pytest.mark.parametrize(("size", "shape"), [((4032, 3024), (1512, 2016, 3)), ((3024, 4032), (2016, 1512, 3)), ((3900, 2925), (1536, 2048, 3))],
                         ids=["a phone", "upright", "half would be too little"])
def test_a_phone_s_photo_leaves_the_decoder_at_half_its_size(decoder: Decoder, size: tuple[int, int], shape: tuple[int, ...]) -> None:
    decoded = got(decoder.decode(encoded(picture(*size), "JPEG")))
    assert decoded.pixels.shape == shape and decoded.declared_px == size and "size" in decoded.changes


def test_noise_in_the_scan_is_refused(decoder: Decoder) -> None:
    data = bytearray(seeds()["jpeg"])
    third = len(data) // 3
    data[third:2 * third] = np.random.default_rng(0).integers(0, 255, third, dtype=np.uint8).tobytes()     # no 0xff: no marker gives it away
    found = decoder.decode(bytes(data))
    assert isinstance(found, Refusal) and found.reason == "corrupt"


@pytest.mark.parametrize("name", sorted(seeds()))
def test_half_a_file_is_refused(decoder: Decoder, name: str) -> None:
    found = decoder.decode(seeds()[name][:len(seeds()[name]) // 2])
    assert isinstance(found, Refusal) and found.reason in ("truncated", "corrupt")


def test_a_hanging_or_dead_child_costs_one_photo() -> None:
    with Decoder(IntakePolicy(decode_seconds=2)) as decoder:
        got(decoder.decode(seeds()["png"]))
        assert decoder._child is not None
        os.kill(decoder._child.pid, signal.SIGSTOP)             # a child that hangs
        hung = decoder.decode(seeds()["png"])
        assert isinstance(hung, Refusal) and hung.reason == "corrupt" and decoder.restarts == 1
        got(decoder.decode(seeds()["jpeg"]))
        decoder._child.kill()
        decoder._child.wait()
        got(decoder.decode(seeds()["jpeg"]))


def test_memory_is_bounded() -> None:
    with Decoder(IntakePolicy(decode_memory_mb=256, max_megapixels=200)) as decoder:
        found = decoder.decode(encoded(Image.new("RGB", (12000, 9000)), "PNG"))      # 432 MB as Pillow holds it
        assert isinstance(found, Refusal) and found.reason == "too_many_pixels"
        got(decoder.decode(seeds()["png"]))


def test_the_child_can_open_nothing() -> None:
    with Decoder() as decoder:
        got(decoder.decode(seeds()["png"]))
        assert decoder._child is not None
        limits = Path(f"/proc/{decoder._child.pid}/limits")
        if not limits.exists():
            pytest.skip("needs /proc")
        rows = {line[:26].strip(): line[26:].split() for line in limits.read_text().splitlines()}
        opened = len(os.listdir(f"/proc/{decoder._child.pid}/fd"))
        assert int(rows["Max open files"][0]) <= opened + 3
        assert rows["Max address space"][0] != "unlimited" and rows["Max core file size"][0] == "0"


def test_two_thousand_mutants(decoder: Decoder) -> None:
    """Flips, cuts, doubled and zeroed stretches of ten files: the parent answers each with pixels or a reason, in time."""
    rng = np.random.default_rng(7)
    slowest = 0.0
    for data in seeds().values():
        for _ in range(205):
            mutant = bytearray(data)
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(len(mutant))) if rng.random() < 0.5 else int(rng.integers(min(400, len(mutant))))
                length = int(rng.integers(1, 64))
                way = int(rng.integers(5))
                if way == 0:
                    mutant[at] ^= 1 << int(rng.integers(8))
                elif way == 1:
                    mutant[at:at + length] = rng.bytes(length)
                elif way == 2:
                    mutant[at:at + length] = b"\xff" * length
                elif way == 3:
                    mutant[at:at] = mutant[at:at + length]
                else:
                    del mutant[at:at + length]
            begun = time.monotonic()
            found = decoder.decode(bytes(mutant))
            slowest = max(slowest, time.monotonic() - begun)
            if isinstance(found, Refusal):
                assert found.reason in PHOTO_REASONS and found.message
            else:
                assert found.pixels.ndim == 3 and min(found.pixels.shape[:2]) >= 1
    assert slowest < decoder.policy.decode_seconds + 5


@pytest.mark.parametrize(("data", "expected"), [
    (b"", "empty_file"), (b"x", "not_an_image"), (b"PK\x03\x04....", "unsupported_format"), (b"GIF89a", "unsupported_format"),
    (b"  <svg xmlns='x'>", "unsupported_format"), (b"BM", "not_an_image"), (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "unsupported_format"),
])
def test_content_decides_not_the_name(data: bytes, expected: str) -> None:
    found = sniff(data)
    assert isinstance(found, Refusal) and found.reason == expected


def test_the_corpus_comes_out_as_its_owner_would_see_it(decoder: Decoder, testdata: Path) -> None:
    """Pictures that must look like the baseline do; the child stays below 600 MB."""
    folder = testdata / "badphotos"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    small = {}
    for file in files:
        found = decoder.decode((folder / file["path"]).read_bytes())
        if isinstance(found, Decoded):
            small[file["path"]] = np.asarray(Image.fromarray(found.pixels).resize((64, 64), Image.Resampling.BOX), float)
    compared = [(f["path"], f["checks"]) for f in files if "similar_to" in f["checks"] and f["path"] in small]
    assert len(compared) >= 20
    for path, checks in compared:
        assert np.abs(small[path] - small[checks["similar_to"]]).mean() <= checks["max_mae_64"], path
    assert decoder._child is not None
    status = Path(f"/proc/{decoder._child.pid}/status")
    if status.exists():
        peak_kb = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        assert peak_kb < 600 * 1024
