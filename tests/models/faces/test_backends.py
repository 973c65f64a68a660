"""One contract for every face backend, on real photos with the real networks; and what happens to weights that nobody vouches for."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from likeness import gate
from likeness.errors import IntegrityError, LikenessError, RecipeError
from likeness.intake.policy import IntakePolicy
from likeness.settings import Backends, InsightfaceWeights, LocalWeights, load_settings
from models.captions.slots import SlotReader
from models.diffusion.bases import MAQUETTE
from models.faces import align
from models.faces.face import Face, FaceDetector, FaceEmbedder, FaceParser, Picture
from models.faces.facexlib_faces import FACE_LABELS, BiSeNetMask
from models.faces.insightface_faces import InsightFaces
from models.faces.photos import Inspection, inspect_photos
from models.faces.tools import DETECTORS, EMBEDDERS, PARSERS, FaceTools, dlib_tools, face_tools
from models.maquette.companions import Bank, bank_digest, bank_for, read_bank
from models.quality import findings, measure
from models.quality.looking import Looker
from models.quality.unsafe import OpenNsfw

SCRFD, MOBILEFACENET, RETINAFACE = "scrfd_2.5g_kps.onnx", "mobilefacenet_128d.onnx", "detection_mobilenet0.25_Final.pth"


def read(path: Path) -> Picture:
    return np.asarray(Image.open(path).convert("RGB"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def files(testdata: Path) -> Path:
    return testdata / "weights" / "face"


@pytest.fixture(scope="module")
def parsing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], LocalWeights]:
    """A BiSeNet file of random weights, or of such that one label is seen everywhere; no trained one is at hand."""
    import torch
    from facexlib.parsing.bisenet import BiSeNet

    def save(everywhere: int | None) -> LocalWeights:
        folder = tmp_path_factory.mktemp("facexlib")
        torch.manual_seed(3)
        network = BiSeNet(19)
        if everywhere is not None:      # what it sees is never negative, so the label with positive weights wins
            with torch.no_grad():
                network.conv_out.conv_out.weight.fill_(-1.0)
                network.conv_out.conv_out.weight[everywhere] = 1.0
        torch.save(network.state_dict(), folder / "parsing_bisenet.pth")
        return LocalWeights(folder=folder, sha256={"parsing_bisenet.pth": sha256(folder / "parsing_bisenet.pth")})
    return save


@pytest.fixture(scope="module")
def backends(files: Path, parsing: Callable[[int | None], LocalWeights]) -> Callable[[str, str], Any]:
    """The backend of a name in a registry, with the weights at hand."""
    made: dict[tuple[str, str], Any] = {}

    def make(role: str, name: str) -> Any:
        if (role, name) not in made:
            facexlib = parsing(None) if role == "parser" and name == "facexlib" else LocalWeights(folder=files)
            registry: Any = {"detector": DETECTORS, "embedder": EMBEDDERS, "parser": PARSERS}[role]
            made[role, name] = registry[name](Backends(insightface=InsightfaceWeights(folder=files), facexlib=facexlib))
        return made[role, name]
    return make


@pytest.fixture(params=sorted(DETECTORS))
def detector(request: pytest.FixtureRequest, backends: Callable[[str, str], Any]) -> FaceDetector:
    made: FaceDetector = backends("detector", request.param)
    return made


@pytest.fixture(params=sorted(EMBEDDERS))
def embedder(request: pytest.FixtureRequest, backends: Callable[[str, str], Any]) -> FaceEmbedder:
    made: FaceEmbedder = backends("embedder", request.param)
    return made


@pytest.fixture(params=sorted(PARSERS))
def parser(request: pytest.FixtureRequest, backends: Callable[[str, str], Any]) -> FaceParser:
    made: FaceParser = backends("parser", request.param)
    return made


@pytest.fixture(scope="module")
def people(testdata: Path, rendered_users: Path) -> dict[str, list[Picture]]:
    """Two photos each of real and rendered people."""
    real = {"suaresito": (0, 8), "obama": (0, 1), "biden": (0, 1)}
    shown = {name: [sorted((testdata / "persons" / name).iterdir())[i] for i in chosen] for name, chosen in real.items()}
    shown |= {user: sorted((rendered_users / user).iterdir())[2:4] for user in ("900001", "900004")}
    return {name: [read(p) for p in paths] for name, paths in shown.items()}


# -- detectors

def test_a_face_is_found_where_it_is_with_points_in_the_order_of_align(detector: FaceDetector, people: dict[str, list[Picture]], backends: Callable[[str, str], Any]) -> None:
    for photos in people.values():
        picture = photos[0]
        faces, reference = detector.find_faces(picture), backends("detector", "dlib").find_faces(picture)
        assert len(faces) == 1
        outer_right, inner_right, outer_left, inner_left, nose = faces[0].points
        assert outer_right[0] > inner_right[0] > inner_left[0] > outer_left[0]
        assert nose[1] > faces[0].points[:4, 1].max()
        mine, theirs = align.fit(faces[0].points), align.fit(reference[0].points)
        assert mine.eye_distance_px == pytest.approx(theirs.eye_distance_px, rel=0.15)
        assert np.hypot(*np.subtract(mine.eyes_px, theirs.eyes_px)) < 0.2 * theirs.eye_distance_px
        assert abs(mine.roll_deg - theirs.roll_deg) < 6


def test_tight_crops_are_found_and_boxes_stay_inside(detector: FaceDetector, testdata: Path) -> None:
    crops = [read(folder / "01.pgm") for folder in sorted((testdata / "persons" / "orl").iterdir())]
    found = [detector.find_faces(crop) for crop in crops]
    assert sum(len(faces) == 1 for faces in found) >= 0.95 * len(crops)
    for crop, faces in zip(crops, found, strict=True):
        for left, top, right, bottom in (f.box_px for f in faces):
            assert 0 <= left < right <= crop.shape[1] and 0 <= top < bottom <= crop.shape[0]


def test_a_dog_is_no_person(detector: FaceDetector, testdata: Path) -> None:
    dogs = sorted((testdata / "objects" / "caosdelola_dog").iterdir())[::4]
    assert [len(detector.find_faces(read(dog))) for dog in dogs] == [0] * len(dogs)


@pytest.mark.parametrize("share", [1 / 6, 1 / 14])
def test_small_faces_are_found(detector: FaceDetector, people: dict[str, list[Picture]], share: float) -> None:
    """A face whose height is this share of the long side: somebody in a room, and across it."""
    width, height = 1600, 1200
    room = cv2.resize(np.random.default_rng(5).integers(60, 200, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    crop = align.crop(people["obama"][0], face_alignment(people["obama"][0]), side_px=round(share * width * align.TIGHT_SIDE_IOD / 2.3))
    room[500:500 + crop.shape[0], 900:900 + crop.shape[1]] = crop
    faces = detector.find_faces(room)
    assert len(faces) == 1
    x, y = align.fit(faces[0].points).eyes_px
    assert abs(x - (900 + crop.shape[1] / 2)) < 0.1 * crop.shape[1] and abs(y - (500 + align.EYE_LINE_REL * crop.shape[0])) < 0.1 * crop.shape[0]


def face_alignment(picture: Picture) -> align.Alignment:
    return align.fit(DETECTORS["dlib"](Backends()).find_faces(picture)[0].points)


@pytest.mark.parametrize("shape", [(256, 256), (1, 1), (40, 1200)], ids=["grey wall", "one pixel", "strip"])
def test_an_empty_picture_has_no_face(detector: FaceDetector, shape: tuple[int, int]) -> None:
    assert detector.find_faces(np.full((*shape, 3), 128, np.uint8)) == []


# -- recognisers

def test_two_photos_of_one_person_are_nearer_than_two_people(embedder: FaceEmbedder, people: dict[str, list[Picture]], backends: Callable[[str, str], Any]) -> None:
    finder: FaceDetector = backends("detector", "dlib")
    vectors = {name: np.stack([embedder.embed_faces(p, finder.find_faces(p)[:1])[0] for p in photos]) for name, photos in people.items()}
    assert len({v.shape for v in vectors.values()}) == 1
    same = [float(np.linalg.norm(v[0] - v[1])) for v in vectors.values()]
    other = [float(np.linalg.norm(a - b)) for n, v in vectors.items() for m, w in vectors.items() if n < m for a in v for b in w]
    assert max(same) < embedder.same_person_distance < min(other) * 1.15
    assert max(same) < min(other)
    lengths = np.linalg.norm(np.concatenate(list(vectors.values())), axis=1)
    assert (np.ptp(lengths) < 1e-5) == (embedder.metric == "cosine")


def test_nobody_is_no_vector_and_several_are_several(embedder: FaceEmbedder, people: dict[str, list[Picture]], backends: Callable[[str, str], Any]) -> None:
    picture = people["obama"][0]
    face: Face = backends("detector", "dlib").find_faces(picture)[0]
    none, one, two = (embedder.embed_faces(picture, [face] * n) for n in (0, 1, 2))
    assert none.shape == (0, one.shape[1]) and none.dtype == one.dtype == np.float32
    assert two.shape == (2, one.shape[1])
    np.testing.assert_allclose(two, np.concatenate([one, one]), atol=1e-5)


def test_a_recogniser_does_not_mind_who_found_the_face(embedder: FaceEmbedder, people: dict[str, list[Picture]], backends: Callable[[str, str], Any]) -> None:
    picture = people["900001"][0]
    vectors = [embedder.embed_faces(picture, backends("detector", name).find_faces(picture)[:1])[0] for name in sorted(DETECTORS)]
    assert max(np.linalg.norm(a - b) for a in vectors for b in vectors) < 0.5 * embedder.same_person_distance


# -- masks

def test_a_mask_is_of_the_crop_s_shape_and_the_same_again(parser: FaceParser, people: dict[str, list[Picture]]) -> None:
    for side_px in (128, 192):
        crop = align.crop(people["obama"][0], face_alignment(people["obama"][0]), side_px=side_px)
        mask = parser.face_mask(crop)
        assert mask.shape == (side_px, side_px) and mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, parser.face_mask(crop))


def test_the_ellipse_is_face_in_the_middle_and_room_in_the_corners() -> None:
    mask = PARSERS["ellipse"](Backends()).face_mask(np.zeros((128, 128, 3), np.uint8))
    assert mask[64, 64] == 255 and mask[0, 0] == mask[0, -1] == mask[-1, 0] == mask[-1, -1] == 0


@pytest.mark.parametrize(("label", "value"), [(1, 255), (17, 255), (0, 0), (16, 0), (18, 0)], ids=["skin", "hair", "room", "cloth", "hat"])
def test_parsing_keeps_the_person_and_leaves_out_what_a_prompt_may_change(parsing: Callable[[int | None], LocalWeights], label: int, value: int) -> None:
    mask = BiSeNetMask(parsing(label)).face_mask(np.random.default_rng(1).integers(0, 255, (128, 128, 3), np.uint8))
    assert (mask == value).all()


def test_parsing_says_what_facexlib_says(parsing: Callable[[int | None], LocalWeights], people: dict[str, list[Picture]]) -> None:
    import torch
    from facexlib.parsing import init_parsing_model
    from torchvision.transforms.functional import normalize, to_tensor

    settings = parsing(None)
    crop = align.crop(people["obama"][0], face_alignment(people["obama"][0]), side_px=512)
    network = init_parsing_model("bisenet", device="cpu", model_rootpath=str(settings.folder))
    with torch.no_grad():
        theirs = network(normalize(to_tensor(crop), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None])[0][0].argmax(0).numpy()
    parser = BiSeNetMask(settings)
    assert (parser.labels(crop) == theirs).mean() > 0.999
    inner = cv2.erode(np.isin(theirs, FACE_LABELS).astype(np.uint8), np.ones((65, 65), np.uint8)).astype(bool)
    assert (parser.face_mask(crop)[inner] > 250).all()


# -- what intake and gate make of a recogniser that is compared by cosine

@pytest.fixture(scope="module")
def cosine(files: Path) -> FaceTools:
    return face_tools(Backends(detect="dlib", identity="insightface", insightface=InsightfaceWeights(folder=files)))


@pytest.fixture(scope="module")
def bank(cosine: FaceTools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Path]:
    """Made where a damaged file lay; and the file that is kept."""
    kept = tmp_path_factory.mktemp("banks") / f"{bank_digest(cosine)}.safetensors"
    kept.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    return bank_for(cosine, cache=kept.parent), kept


def inspect(folder: Path, tools: FaceTools) -> Inspection:
    from likeness.intake.sources import open_source
    from likeness.store import MemoryStore

    policy = IntakePolicy()
    return inspect_photos(open_source(str(folder), store=MemoryStore(), policy=policy), tools=tools, policy=policy)


@pytest.mark.parametrize("found_by", sorted(DETECTORS))
def test_intake_finds_strangers_and_copies_with_any_detector_and_cosine(found_by: Any, files: Path, rendered_users: Path, tmp_path: Path) -> None:
    tools = face_tools(Backends(detect=found_by, identity="insightface", insightface=InsightfaceWeights(folder=files), facexlib=LocalWeights(folder=files)))
    shots = {n: sorted((rendered_users / str(n)).iterdir()) for n in (900001, 900004, 900010)}
    for shot in range(6):
        shutil.copy(shots[900001][shot], tmp_path / f"mine_{shot}.jpg")
    for number in (900004, 900010):
        shutil.copy(shots[number][1], tmp_path / f"other_{number}.jpg")
    picture = Image.open(shots[900001][0])
    picture.resize((400, 400)).save(tmp_path / "smaller.png")
    found = inspect(tmp_path, tools)
    assert {j.name for j in found.judgements if j.reason == "identity_mismatch"} == {"other_900004.jpg", "other_900010.jpg"}
    assert {j.name for j in found.judgements if j.reason == "near_duplicate"} == {"smaller.png"}
    assert found.set.verdict == "ok" and len(found.accepted) == 6


def test_the_gate_knows_a_person_from_others_by_cosine(cosine: FaceTools, bank: tuple[Bank, Path], rendered_users: Path) -> None:
    def vectors(user: str, shots: slice) -> NDArray[np.float32]:
        pictures = [read(p) for p in sorted((rendered_users / user).iterdir())[shots]]
        return np.concatenate([cosine.embed_faces(p, cosine.find_faces(p)[:1]) for p in pictures])

    own = vectors("900001", slice(0, 8))
    thumb = np.zeros((32, 32, 3), np.float32)
    references = measure.References(measure.Identity(cosine.recogniser_name, bank[0].digest, own[:2], own, bank[0].embeddings), thumb[None])
    seen = [measure.Seen(f"{n:064x}", "plain", 1, v, thumb) for n, v in enumerate([*vectors("900001", slice(8, 14)), *vectors("900004", slice(0, 6))])]
    measured = measure.measure(seen, references)
    assert measured.floor - measured.ceiling > 0.15
    right = [gate.is_person(s, measured, gate.GatePolicy()) for s in measured.scores]
    assert sum(right[:6]) >= 5 and not any(right[6:])


def test_two_recognisers_vote_and_either_may_refuse(cosine: FaceTools, bank: tuple[Bank, Path], files: Path, rendered_users: Path) -> None:
    both = face_tools(Backends(second_identity="insightface", insightface=InsightfaceWeights(folder=files)))
    assert both.second is not None and both.second.recogniser_name == cosine.recogniser_name and both.second.second is None
    assert both.recogniser_name == "dlib" and both.name == dlib_tools().name, "what crops are keyed with stays"
    pictures = {user: [read(p) for p in sorted((rendered_users / user).iterdir())[:8]] for user in ("900001", "900004")}
    own = pictures["900001"][:5]
    crops = [align.crop(p, align.fit(both.find_faces(p)[0].points), side_px=128) for p in own]
    first, second = both.embed_portraits(crops), both.second.embed_portraits(crops)
    thumb = np.zeros((1, 32, 32, 3), np.float32)
    references = measure.References(measure.Identity("dlib", read_bank().digest, first[:2], first, read_bank().embeddings), thumb,
                                    second=measure.Identity(bank[0].backend, bank[0].digest, second[:2], second, bank[0].embeddings))
    looker = Looker(both, SlotReader.load(MAQUETTE / "weights" / "clip"), findings.usual([], base="none"), OpenNsfw())
    seen = [looker.see(p, name=f"{n:064x}", category="plain", slots={}) for n, p in enumerate([*pictures["900001"][5:], *pictures["900004"][5:]])]
    liar = dataclasses.replace(seen[0], second=seen[-1].second)              # one recogniser is fooled, the other one not
    dumb = dataclasses.replace(seen[0], second=None)
    measured = measure.measure([*seen, liar, dumb], references)
    assert measured.second is not None and measured.second.bank == bank[0].digest and measured.second.floor - measured.second.ceiling > 0.15
    verdicts = [gate.is_person(s, measured, gate.GatePolicy()) for s in measured.scores]
    assert verdicts == [True] * 3 + [False] * 5
    alone = measured.model_copy(update={"second": None})
    assert gate.is_person(alone.scores[-2], alone, gate.GatePolicy())


def test_every_recogniser_has_its_own_bank_made_once(cosine: FaceTools, bank: tuple[Bank, Path]) -> None:
    made, kept = bank
    assert made.embeddings.shape == (200, 128) and made.backend == cosine.recogniser_name
    assert made.digest != read_bank().digest and kept.stem == made.digest
    assert list(kept.parent.iterdir()) == [kept]
    written = kept.stat().st_mtime_ns
    again = bank_for(cosine, cache=kept.parent)
    assert kept.stat().st_mtime_ns == written and again.digest == made.digest
    np.testing.assert_array_equal(again.embeddings, made.embeddings)


def test_the_default_has_the_shipped_bank() -> None:
    assert bank_for(face_tools(Backends())) is read_bank()


# -- settings choose, and weights are vouched for

@pytest.mark.parametrize(("detect", "identity", "mask", "name"), [
    ("dlib", "dlib", "ellipse", "dlib/ellipse"), ("insightface", "insightface", "ellipse", "insightface-I/ellipse"), ("facexlib", "dlib", "ellipse", "facexlib-F/dlib/ellipse"),
    ("dlib", "insightface", "ellipse", "dlib/insightface-I/ellipse"),
])
def test_settings_choose(files: Path, monkeypatch: pytest.MonkeyPatch, detect: str, identity: str, mask: str, name: str) -> None:
    for key, value in {"DETECT": detect, "IDENTITY": identity, "MASK": mask, "INSIGHTFACE__FOLDER": str(files), "FACEXLIB__FOLDER": str(files)}.items():
        monkeypatch.setenv(f"LIKENESS_BACKENDS__{key}", value)
    tools = face_tools(load_settings().backends)
    assert tools.name.replace(InsightFaces(InsightfaceWeights(folder=files)).name, "insightface-I").replace(f"facexlib-{sha256(files / RETINAFACE)[:12]}", "facexlib-F") == name
    assert ("non-commercial" in tools.licence) == ("insightface" in (detect, identity))


def insightface(folder: Path, **more: Any) -> InsightFaces:
    return InsightFaces(InsightfaceWeights(folder=folder, **more))


def retinaface(folder: Path, **more: Any) -> FaceDetector:
    return DETECTORS["facexlib"](Backends(facexlib=LocalWeights(folder=folder, **more)))


@pytest.fixture
def pack(files: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    for name in (SCRFD, MOBILEFACENET, RETINAFACE):
        (folder / name).write_bytes((files / name).read_bytes())
    return folder


WALL = np.full((64, 64, 3), 128, np.uint8)


def changed(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"\0")
    return path


class Opened:
    """A pickle that says when somebody unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_that_nobody_vouches_for_is_never_opened(pack: Path, tmp_path: Path) -> None:
    (pack / RETINAFACE).write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    with pytest.raises(IntegrityError, match=f'anybody vouches for.*"{RETINAFACE}" = "{sha256(pack / RETINAFACE)}".*state it as backends.facexlib.sha256'):
        retinaface(pack)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(("open_it", "name"), [(insightface, SCRFD), (retinaface, RETINAFACE)], ids=["insightface", "facexlib"])
def test_a_file_that_is_not_what_the_settings_state_is_refused(pack: Path, open_it: Callable[..., Any], name: str) -> None:
    good = sha256(pack / name)
    assert open_it(pack, sha256={name: good}).find_faces(WALL) == []
    changed(pack / name)
    with pytest.raises(IntegrityError, match=f"{name} has sha256 {sha256(pack / name)}, .* states {good}.*not opened"):
        open_it(pack, sha256={name: good})


@pytest.mark.parametrize(("open_it", "name"), [(insightface, SCRFD), (retinaface, RETINAFACE)], ids=["insightface", "facexlib"])
def test_a_file_that_changes_after_the_check_is_not_loaded(pack: Path, open_it: Callable[..., Any], name: str) -> None:
    detector = open_it(pack)
    changed(pack / name)
    with pytest.raises(IntegrityError, match=f"{name} changed after it was checked"):
        detector.find_faces(WALL)


def test_a_strange_file_beside_good_ones_is_not_shown_to_the_loader(pack: Path) -> None:
    (pack / "a.onnx").write_bytes(b"no network")
    assert insightface(pack).find_faces(WALL) == []


@pytest.mark.parametrize(("left", "act", "words"), [
    ((), lambda f: insightface(f), "holds no .onnx file: put the file there"),
    ((), lambda f: retinaface(f), "holds no detector .detection_Resnet50_Final.pth or detection_mobilenet0.25_Final.pth.: put the file there"),
    ((MOBILEFACENET,), lambda f: insightface(f).find_faces(WALL), f"no face detector that insightface can read among {MOBILEFACENET} .AssertionError.: put one there"),
    ((SCRFD,), lambda f: insightface(f).embed_faces(WALL, []), "holds no network for recognition: put the file there"),
    ((SCRFD,), lambda f: insightface(f / "gone"), "found 'gone', which is no folder here"),
    ((SCRFD,), lambda f: insightface(f, sha256={"det_10g.onnx": "0" * 64}), "sha256 names det_10g.onnx, which .*folder does not hold"),
    ((RETINAFACE,), lambda f: BiSeNetMask(LocalWeights(folder=f)), "holds no parsing network .parsing_bisenet.pth."),
], ids=["no onnx", "no pth", "no detector", "no recogniser", "no folder", "stated and missing", "no parsing"])
def test_what_is_missing_is_named_with_its_cure(pack: Path, left: tuple[str, ...], act: Callable[[Path], Any], words: str) -> None:
    for path in list(pack.iterdir()):
        if path.name not in left:
            path.unlink()
    with pytest.raises(RecipeError, match=words):
        act(pack)


@pytest.mark.parametrize(("open_it", "name"), [(insightface, SCRFD), (retinaface, RETINAFACE)], ids=["insightface", "facexlib"])
def test_a_file_that_is_vouched_for_and_no_network_is_named(pack: Path, open_it: Callable[..., Any], name: str) -> None:
    (pack / name).write_bytes(b"no network")
    with pytest.raises(RecipeError, match=rf"{name}.* \(\w+\): .*put "):
        open_it(pack, sha256={name: sha256(pack / name)}).find_faces(WALL)


def test_a_recogniser_that_nobody_measured_needs_its_cosine(pack: Path) -> None:
    model = onnx.load(pack / MOBILEFACENET)
    model.doc_string = "the same numbers, another hash"
    onnx.save(model, pack / MOBILEFACENET)
    with pytest.raises(LikenessError, match=f'holds no network for recognition that anybody vouches for.*"{MOBILEFACENET}"'):
        insightface(pack).embed_faces(WALL, [])
    stated = {MOBILEFACENET: sha256(pack / MOBILEFACENET)}
    with pytest.raises(RecipeError, match=r"has not measured this recogniser.*backends\.insightface\.same_person_cosine"):
        insightface(pack, sha256=stated).embed_faces(WALL, [])
    face = Face((0, 0, 64, 64), align.template_in_crop(64), 1.0)
    for measured in (0.0, 0.5):
        (vector,) = insightface(pack, sha256=stated, same_person_cosine=measured).embed_faces(WALL, [face])
        assert 2 * float(vector @ vector) * (1 - measured) == pytest.approx(0.36, rel=1e-4)      # at that cosine the distance is 0.6
