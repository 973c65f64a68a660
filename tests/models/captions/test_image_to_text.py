"""Captioners of transformers' classes, tiny and untaught: how they are found, refused, loaded and asked. What they would say is not tested here."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from likeness.errors import IntegrityError, RecipeError, ServerUnreachable
from likeness.records import CaptionSet, FaceMeasures, Intake, Photo, Portrait, PortraitSet, SetJudgement
from likeness.settings import Backends, load_settings
from models.captions import image_to_text
from models.captions.editable import editable
from models.captions.image_to_text import KINDS, ImageToText, files_of
from models.captions.slots import MIN_PROBABILITY, subject_captions
from models.diffusion import hub
from tasks import pictures, preparing
from tasks.runtime import Tools
from tests.models.captions import tiny


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untaught networks never end by themselves."""
    for name, kind in KINDS.items():
        monkeypatch.setitem(KINDS, name, dataclasses.replace(kind, most=12))       # type: ignore[misc]


both = pytest.mark.parametrize("name", sorted(KINDS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return {name: tiny.build(tmp_path_factory.mktemp(name), name) for name in KINDS}


@pytest.fixture(scope="module")
def captioners(folders: dict[str, Path]) -> dict[str, ImageToText]:
    return {name: ImageToText.load(name, folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def crops() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), np.uint8)


@both
def test_the_same_crops_are_described_in_the_same_words_by_whoever_loads_it(folders: dict[str, Path], captioners: dict[str, ImageToText], crops: NDArray[np.uint8],
                                                                            name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    said = captioners[name].describe(crops)
    assert len(set(said)) == 3                                  # it looks at each
    assert not any("<" in text or "[" in text for text in said)
    torch.manual_seed(2)
    again = ImageToText.load(name, folders[name], device="cpu")
    assert again.network.dtype == torch.float32
    assert not any(p.requires_grad for p in again.network.parameters())
    monkeypatch.setattr(image_to_text, "BATCH", 2)              # a batch and a rest
    assert again.describe(crops) == said
    assert again.describe(crops[:0]) == []


@both
def test_its_words_become_a_caption_of_the_subject(captioners: dict[str, ImageToText], crops: NDArray[np.uint8], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [editable(text) for text in captioners[name].describe(crops)]
    assert captioners[name].captions(crops, who="sks man") == [(f"a photo of sks man, {text}" if text else "a photo of sks man", {}, "image_to_text") for text in kept]
    monkeypatch.setattr(ImageToText, "describe", lambda self, crops: ["", "a man", "a smiling man with a beard and a hat"])
    assert [text for text, _, _ in captioners[name].captions(crops, who="sks man")] == ["a photo of sks man", "a photo of sks man", "a photo of sks man, smiling, with a hat"]


def test_a_sidecar_wins_and_its_picture_is_not_described(captioners: dict[str, ImageToText], crops: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(ImageToText, "describe", lambda self, given: shown.append(len(given)) or ["in a park"] * len(given))
    said = subject_captions(captioners["blip"], crops, [None, " on a\nboat ", ""], who="sks man")
    assert said == [("a photo of sks man, in a park", {}, "image_to_text"), ("a photo of sks man, on a boat", {}, "sidecar"), ("a photo of sks man, in a park", {}, "image_to_text")]
    assert subject_captions(captioners["blip"], crops, ["a", "b", "sks man asleep"], who="sks man")[2] == ("sks man asleep", {}, "sidecar")
    late, other = "very " * 50 + "sleepy sks man", "Sks man asleep, not task manager"
    said = subject_captions(captioners["blip"], crops, [late, other, "the task manager"], who="sks man")
    assert [words for words, _, _ in said] == [f"a photo of sks man, {late}", "sks man asleep, not task manager", "a photo of sks man, the task manager"]
    assert shown == [2]


def _without(tensor: str) -> Callable[[Path], None]:
    def take_out(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        del held[next(key for key in sorted(held) if key.endswith(tensor))]
        save_file(held, folder / "model.safetensors", {"format": "pt"})
    return take_out


@both
@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"no safetensors, but pytorch_model\.bin: pickled weights are never read; .*save_pretrained"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors: "),
    (lambda folder: (folder / "config.json").unlink(), "holds no config.json that names a model_type"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "its folder holds a 'llava'"),
    (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]), "cannot be loaded from its folder"),
    (_without("weight"), "no weights for .* which chance would fill"),
    (lambda folder: [(folder / file).unlink() for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json")], "cannot be loaded|no weights"),
], ids=["pickled", "no weights", "no config", "another kind", "truncated", "a tensor short", "no tokenizer"])
def test_a_folder_that_is_no_such_captioner_is_refused_with_a_cure(folders: dict[str, Path], tmp_path: Path, name: str, damage: Callable[[Path], Any], words: str) -> None:
    folder = tmp_path / "captioner"
    shutil.copytree(folders[name], folder)
    damage(folder)
    with pytest.raises(RecipeError, match=words):
        ImageToText.load(name, folder, device="cpu")


def test_one_kind_is_not_taken_for_the_other_and_a_folder_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="captioner 'blip' is a 'blip', its folder holds a 'florence2'"):
        files_of("blip", folders["florence"])
    with pytest.raises(RecipeError, match=r"backends\.captions_folder is 'nowhere', which is no folder"):
        files_of("blip", tmp_path / "nowhere")


def test_code_in_the_folder_never_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "captioner"
    shutil.copytree(folders["florence"], folder)
    (folder / "modeling_florence2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Florence2ForConditionalGeneration: ...\n")
    described = (folder / "config.json").read_text()
    (folder / "config.json").write_text(described.replace("{", '{"auto_map": {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"},', 1))
    ImageToText.load("florence", folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def tools(home: Path, **backends: Any) -> Tools:
    settings = load_settings(overrides={"home": str(home)})
    return Tools(settings.model_copy(update={"backends": Backends(**backends)}))


def test_the_key_of_captions_names_what_said_them(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = tools(tmp_path)
    assert plain.captioner_params == {"captioner": "slots", "min_probability": MIN_PROBABILITY, "clip": plain.slots_digest}      # as before there was a choice
    blip = tools(tmp_path, captions="blip", captions_folder=folders["blip"])
    assert blip.captioner_params == {"captioner": "blip", "files": files_of("blip", folders["blip"])}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= blip.captioner_params["files"].keys()
    other = tools(tmp_path, captions="blip", captions_folder=tiny.build(tmp_path / "other", "blip", seed=4))
    assert other.captioner_params != blip.captioner_params
    folder = tmp_path / "changing"
    shutil.copytree(folders["blip"], folder)
    changing = tools(tmp_path, captions="blip", captions_folder=folder)
    assert changing.captioner_params
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(IntegrityError, match="changed while this process ran"):
        _ = changing.captioner


def test_a_captioner_of_the_hub_is_pinned_and_fetched_without_pickles(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(repository: str, **more: Any) -> str:
        asked.append((repository, more["revision"], more["cache_dir"], more["local_files_only"], [p for p in more["allow_patterns"] if "bin" in p or p == "*"]))
        return str(folders["blip"])

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    pinned = tools(tmp_path, captions="blip", captions_hub=f"somebody/blip@{'0123456789' * 4}")
    assert pinned.captioner.wide
    assert asked == [("somebody/blip", "0123456789" * 4, tmp_path / "captioners", False, [])]


def test_a_pinned_captioner_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    pinned = tools(tmp_path, captions="blip", captions_hub=f"somebody/blip@{'0123456789' * 4}")
    with pytest.raises(ServerUnreachable, match=r"captioner 'somebody/blip' is not on this machine and the Hub does not answer: .* backends\.captions_folder"):
        _ = pinned.captioner           # huggingface_hub itself answers, in its offline mode


def test_the_stage_shows_it_each_portrait_and_the_reader_of_slots_tight_ones_only(folders: dict[str, Path], tmp_path: Path) -> None:
    def portrait(framing: str, grey: int) -> Portrait:
        pixels = np.full((40, 40, 3), grey, np.uint8)
        pixels[:20, :20] = 255 - grey
        return Portrait.model_validate(dict(photo="1" * 64, crop=pictures.put(blip.store, "subjects/ada/portraits", pixels), framing=framing, side_px=40, embedding=(0.0,),
                                            mask=pictures.put(blip.store, "subjects/ada/portraits", pixels[..., 0]),
                                            face=FaceMeasures(box_px=(8.0, 8.0, 32.0, 32.0), eye_distance_px=9.0, roll_deg=0.0, sharpness=9.0, score=1.0, visible=1.0)))

    blip = tools(tmp_path, captions="blip", captions_folder=folders["blip"])
    cut = PortraitSet(portraits=(portrait("tight", 10), portrait("wide", 200)))
    photo = Photo(sha256="1" * 64, source_sha256="2" * 64, blob=cut.portraits[0].crop, width_px=40, height_px=40)
    intake = Intake(photos=(photo,), judgements=(), set=SetJudgement(verdict="ok", reason=None, message=""))

    def captions(of: Tools) -> CaptionSet:
        of.__dict__["bare_store"] = blip.bare_store
        return preparing._caption(of, intake, cut, "zqaa man")

    said = captions(blip).captions
    assert [c.source for c in said] == ["image_to_text"] * 2
    assert [c.portrait for c in said] == [p.digest for p in cut.portraits]
    assert said[0].text != said[1].text
    tight, wide = captions(tools(tmp_path)).captions
    assert (tight.text, tight.slots, tight.source) == (wide.text, wide.slots, "slots")
