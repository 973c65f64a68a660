"""Intake end to end with the default networks: each file's verdict, the set's, and what may lie in a folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from likeness.intake.policy import IntakePolicy
from likeness.intake.sources import Folder, ZipArchive
from likeness.records import PhotoJudgement
from models.faces import align
from models.faces.photos import Inspection, inspect_photos
from models.faces.tools import FaceTools, dlib_tools


@pytest.fixture(scope="module")
def tools() -> FaceTools:
    return dlib_tools()


@pytest.fixture(scope="module")
def corpus(testdata: Path) -> Path:
    return testdata / "badphotos"


@pytest.fixture(scope="module")
def manifest(corpus: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((corpus / "manifest.json").read_text())
    return read


def look(folder: Path, tools: FaceTools, **policy: Any) -> Inspection:
    return inspect_photos(Folder(folder, IntakePolicy(**policy)), tools=tools, policy=IntakePolicy(**policy))


def named(inspection: Inspection) -> dict[str, PhotoJudgement]:
    return {j.name: j for j in inspection.judgements}


def right(expected: dict[str, Any], judged: PhotoJudgement) -> bool:
    """The corpus's own rule."""
    fine = {expected["verdict"] if expected["reason"] is None else f"{expected['verdict']}:{expected['reason']}", *expected.get("also_ok", [])}
    if fine & {"accept", "normalise"}:
        fine |= {"accept", "normalise"}
    return judged.verdict in fine or f"{judged.verdict}:{judged.reason}" in fine


def test_the_corpus_alone_and_together(corpus: Path, manifest: dict[str, Any], tools: FaceTools, tmp_path: Path) -> None:
    """Every file alone in a folder (so that nothing is a duplicate), then all of them at once."""
    files = manifest["files"]
    wrong = []
    for number, file in enumerate(files):
        alone = tmp_path / str(number)
        alone.mkdir()
        shutil.copy(corpus / file["path"], alone)
        (judged,) = look(alone, tools).judgements
        if not right(file["expect"], judged):
            wrong.append((file["path"], judged))
        if file["expect"]["verdict"] in ("reject", "ignore") and not {"accept", "normalise"} & set(file["expect"]["also_ok"]):
            assert judged.verdict in ("reject", "ignore"), f"unsafe accept: {file['path']}"
    assert len(wrong) <= 0.03 * len(files), wrong

    together = look(corpus / "files", tools)
    assert len(together.judgements) == len(files)
    expected = {file["path"].removeprefix("files/"): file["expect"] for file in files}
    wrong = [(j.name, j) for j in together.judgements if not right(expected[j.name], j) and j.reason not in ("near_duplicate", "duplicate")]
    assert len(wrong) <= 0.03 * len(files), wrong
    assert together.set.reason == "too_few_distinct_photos"      # the whole corpus is one face
    assert all(j.message for j in together.judgements)
    assert json.dumps(together.as_json())


def test_hostile_names(corpus: Path, manifest: dict[str, Any], tools: FaceTools, tmp_path: Path) -> None:
    names = manifest["hostile_names"]["names"]
    for name in names:
        shutil.copy(corpus / "files" / "ok_baseline.jpg", tmp_path / name)
    judged = named(look(tmp_path, tools))
    assert set(judged) == set(names)
    assert sorted(str(j.reason) for j in judged.values()) == ["None", *["duplicate"] * (len(names) - 1)]


@pytest.fixture
def specials(corpus: Path, manifest: dict[str, Any], tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "photos"
    (folder / "sp").mkdir(parents=True)
    base = corpus / "files" / "ok_baseline.jpg"
    shutil.copy(base, folder / "sp" / "ok.jpg")
    bound = []
    for number, special in enumerate(manifest["special"]):
        name = special["path"].encode("ascii").decode("unicode_escape") if "\\ud" in special["path"] else special["path"]
        path, make = folder / name, special["make"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if make == "directory":
            path.mkdir()
        elif make.startswith("symlink:"):
            path.symlink_to(make.removeprefix("symlink:"))
        elif make == "fifo":
            os.mkfifo(path)
        elif make == "socket":
            bound.append(socket.socket(socket.AF_UNIX))
            here = os.getcwd()
            os.chdir(path.parent)      # the address of a socket has 108 bytes
            bound[-1].bind(path.name)
            os.chdir(here)
        elif make == "mode000":
            path.write_bytes(base.read_bytes() + b"000")
            path.chmod(0)
        elif make.startswith("sparse:"):
            with path.open("wb") as file:
                file.truncate(int(make.removeprefix("sparse:")))
        elif make.startswith("hardlink:"):
            os.link(folder / "sp" / "ok.jpg", path)
        else:
            path.write_bytes(base.read_bytes() + bytes([number]))      # other bytes: no exact duplicate
    yield folder
    for sock in bound:
        sock.close()


def test_special_files(specials: Path, manifest: dict[str, Any], tools: FaceTools) -> None:
    judged = named(look(specials, tools))
    for special in manifest["special"]:
        name = special["path"].replace("\\udc", "\\x")
        if special["make"].startswith("hardlink"):
            assert {judged[name].reason, judged["sp/ok.jpg"].reason} & {"duplicate"}      # one of the two names, in the order of names
        elif special["expect"]["verdict"] == "normalise":
            assert judged[name].verdict in ("accept", "normalise") or judged[name].reason == "near_duplicate", judged[name]
        else:
            assert (judged[name].verdict, judged[name].reason) == (special["expect"]["verdict"], special["expect"]["reason"]), name
    assert "root:" not in str(judged)


def strange(rendered_users: Path, folder: Path, mine: list[int], others: list[tuple[int, int]], person: int = 900001) -> None:
    for shot in mine:
        shutil.copy(sorted((rendered_users / str(person)).iterdir())[shot], folder / f"mine_{shot:02}.jpg")
    for user, shot in others:
        shutil.copy(sorted((rendered_users / str(user)).iterdir())[shot], folder / f"other_{user}_{shot:02}.jpg")


def test_a_stranger_is_found_and_the_rest_goes_on(rendered_users: Path, tools: FaceTools, tmp_path: Path) -> None:
    strange(rendered_users, tmp_path, list(range(6)), [(900004, 1), (900010, 2)])
    found = look(tmp_path, tools)
    assert {j.name for j in found.judgements if j.reason == "identity_mismatch"} == {"other_900004_01.jpg", "other_900010_02.jpg"}
    assert found.set.verdict == "ok" and len(found.accepted) == 6


def test_half_and_half_is_ambiguous(rendered_users: Path, tools: FaceTools, tmp_path: Path) -> None:
    strange(rendered_users, tmp_path, [0, 1, 2], [(900004, 0), (900004, 1), (900004, 2)])
    assert look(tmp_path, tools).set.reason == "ambiguous_identity"


def test_copies_of_the_person_outvote_one_stranger(corpus: Path, rendered_users: Path, tools: FaceTools, tmp_path: Path) -> None:
    """One shot of each, but three files of one: the files decide, the stranger is named."""
    for name in ("ok_baseline.jpg", "ok_side_512x1024.jpg", "exif_orient_1.jpg"):
        shutil.copy(corpus / "files" / name, tmp_path)
    strange(rendered_users, tmp_path, [], [(900004, 1)])
    found = look(tmp_path, tools)
    assert named(found)["other_900004_01.jpg"].reason == "identity_mismatch"
    assert found.set.verdict == "reject"


@pytest.mark.parametrize(("names", "reason"), [
    (["ok_baseline.jpg"], "too_few_photos"),
    (["ok_baseline.jpg", "dup_reencoded_q60.jpg", "dup_resized.jpg", "dup_mirrored.jpg", "dup_cropped.jpg"], "too_few_distinct_photos"),
    (["zero_bytes.jpg", "noface_cat.jpg", "trunc_60pct.png", "bomb_header_50000sq.png"], "no_usable_photo"),
    ([], "no_usable_photo"),
])
def test_sets(corpus: Path, tools: FaceTools, tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        shutil.copy(corpus / "files" / name, tmp_path)
    found = look(tmp_path, tools)
    assert (found.set.verdict, found.set.reason) == ("reject", reason) and found.set.message


def test_different_shots_of_one_person_are_no_copies(rendered_users: Path, tools: FaceTools, tmp_path: Path) -> None:
    strange(rendered_users, tmp_path, list(range(10)), [], person=900019)
    assert not [j for j in look(tmp_path, tools).judgements if j.reason in ("near_duplicate", "duplicate")]


def test_blur_darkness_and_size_are_measured_on_the_face(corpus: Path, tools: FaceTools, tmp_path: Path) -> None:
    import cv2

    base = np.asarray(Image.open(corpus / "files" / "ok_baseline.jpg").convert("RGB"))
    Image.fromarray(cv2.GaussianBlur(base, (0, 0), 7)).save(tmp_path / "blurred.png")
    Image.fromarray(base // 6).save(tmp_path / "dark.png")
    Image.fromarray(cv2.resize(base, (260, 260), interpolation=cv2.INTER_AREA)).save(tmp_path / "far.png")
    Image.fromarray(np.hstack([base, base[:, ::-1]])).save(tmp_path / "twins.png")
    Image.fromarray(np.hstack([base, cv2.copyMakeBorder(cv2.resize(base, (205, 205)), 0, 307, 0, 0, cv2.BORDER_CONSTANT)])).save(tmp_path / "bystander.png")
    judged = named(look(tmp_path, tools))
    assert judged["blurred.png"].reason in ("too_blurry", "no_face")
    assert judged["dark.png"].reason == "too_dark"
    assert judged["far.png"].reason == "face_too_small"
    assert judged["twins.png"].reason == "several_faces"
    assert judged["bystander.png"].verdict in ("accept", "normalise")


def test_a_side_car_is_the_caption_and_no_bad_photo(corpus: Path, tools: FaceTools, tmp_path: Path) -> None:
    shutil.copy(corpus / "files" / "ok_baseline.jpg", tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("in an orange suit\n")
    found = look(tmp_path, tools)
    assert found.accepted[0].sidecar == "in an orange suit" and named(found)["a.txt"].verdict == "ignore"


def test_dogs_are_no_people(testdata: Path, tools: FaceTools, tmp_path: Path) -> None:
    dogs = sorted((testdata / "objects" / "caosdelola_dog").iterdir())[:8]
    for dog in dogs:
        shutil.copy(dog, tmp_path)
    assert [j.reason for j in look(tmp_path, tools).judgements].count("no_face") == len(dogs)


def test_a_crop_is_upright_and_its_eyes_lie_where_they_should(corpus: Path, tools: FaceTools) -> None:
    pixels = np.asarray(Image.open(corpus / "files" / "ok_baseline.jpg").convert("RGB").rotate(20, Image.Resampling.BICUBIC))
    face = tools.main_face(np.ascontiguousarray(pixels))
    assert face is not None
    again = tools.main_face(align.crop(pixels, align.fit(face.points), side_px=256))
    assert again is not None
    found = align.fit(again.points)
    assert abs(found.roll_deg) < 6 and abs(found.eyes_px[0] - 128) < 10 and abs(found.eyes_px[1] - align.EYE_LINE_REL * 256) < 10


def test_a_zip_is_judged_like_its_folder_and_an_archive_in_it_is_no_photo(root: Path, tools: FaceTools, tmp_path: Path) -> None:
    photos = sorted((root / "examples" / "demo").glob("*.jpg"))[:6]
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as inner:
        inner.write(photos[0], "a.jpg")
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in [*photos, tmp_path / "inner.zip"]:
            archive.write(file, file.name)
            shutil.copy(file, folder)
    policy = IntakePolicy()
    zipped = inspect_photos(ZipArchive(tmp_path / "photos.zip", policy), tools=tools, policy=policy)
    assert zipped.as_json() == look(folder, tools).as_json()
    assert zipped.set.verdict == "ok"
    assert named(zipped)["inner.zip"].reason == "unsupported_format"
