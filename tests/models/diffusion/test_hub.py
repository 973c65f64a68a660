"""Bases from the Hub: what is asked of it, and what is said when it gives nothing. Nothing here leaves this machine."""

from __future__ import annotations

import errno
import fnmatch
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

from likeness.errors import LikenessError, ResourceError, ServerUnreachable, UnknownBase
from likeness.recipe import Lora
from likeness.settings import load_settings
from models.diffusion import bases, hub
from tasks.runtime import Tools
from tests.models.diffusion import tiny

COMMIT = "0123456789" * 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What a stand-in for the Hub is asked; it gives a tiny SDXL that lies beside pickles."""
    calls: list[dict[str, Any]] = []
    folder = tiny.build(tmp_path, "sdxl", prediction="epsilon")

    def snapshot(repository: str, **more: Any) -> str:
        calls.append({"repository": repository, **more})
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setitem(bases.CATALOGUE, "tiny", bases.Entry("sdxl", tiny.SIDE_PX, "epsilon", "none", "sks", 3.0, hub=("somebody/tiny", COMMIT)))  # type: ignore[arg-type]
    return calls


@pytest.mark.parametrize("allowed", [True, False])
def test_a_base_comes_at_the_pinned_commit_and_only_where_that_is_allowed(asked: list[dict[str, Any]], tmp_path: Path, allowed: bool) -> None:
    settings = load_settings(overrides={"home": str(tmp_path / "home")}).model_copy(update={"base": "tiny", "recipe": Lora(base="tiny"), "base_hub": allowed})
    tools = Tools(settings)
    assert tools.base.ref.family == "sdxl"
    [call] = asked                                    # once for reference and weights
    assert (call["repository"], call["revision"], call["cache_dir"], call["local_files_only"]) == ("somebody/tiny", COMMIT, tmp_path / "home" / "bases", not allowed)


def test_a_folder_of_yours_and_a_base_that_ships_ask_nobody(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert hub.place("tiny", folder=tmp_path, cache=tmp_path, download=True) == tmp_path
    assert hub.place("maquette", folder=None, cache=tmp_path, download=True) is None
    assert hub.place("nobody", folder=None, cache=tmp_path, download=True) is None
    assert not asked


@pytest.mark.parametrize(("name", "repository_file", "wanted"), [
    ("sd15", "unet/diffusion_pytorch_model.safetensors", True), ("sd15", "unet/diffusion_pytorch_model.bin", False), ("sd15", "text_encoder/model.fp16.safetensors", False),
    ("sd15", "v1-5-pruned.ckpt", False), ("sd15", "v1-5-pruned.safetensors", False), ("sd15", "safety_checker/model.safetensors", False), ("sd15", "model_index.json", True),
    ("sd15", "tokenizer/merges.txt", True), ("sd15", "text_encoder_2/model.safetensors", False), ("sd15", "unet/diffusion_pytorch_model.non_ema.safetensors", False),
    ("sdxl", "text_encoder_2/model.safetensors", True), ("sdxl", "tokenizer_2/vocab.json", True), ("sdxl", "vae_1_0/diffusion_pytorch_model.safetensors", False),
    ("sdxl", "text_encoder/openvino_model.bin", False), ("sdxl", "unet/model.onnx", False), ("sdxl", "scheduler/scheduler_config.json", True), ("sdxl", "anything.py", False),
])
def test_nothing_but_what_is_loaded_is_downloaded(name: str, repository_file: str, wanted: bool) -> None:
    assert any(fnmatch.fnmatch(repository_file, pattern) for pattern in hub.wanted_files(name)) is wanted


def test_what_is_downloaded_of_sd15_is_all_that_loading_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index names a feature extractor and a safety checker, which are not downloaded."""
    folder = tiny.build(tmp_path, "sd15", prediction="epsilon")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        if not any(fnmatch.fnmatch(file.relative_to(folder).as_posix(), pattern) for pattern in hub.wanted_files("sd15")):
            file.unlink()
    monkeypatch.setitem(bases.CATALOGUE, "tiny", bases.Entry("sd15", tiny.SIDE_PX, "epsilon", "none", "sks", 3.0))  # type: ignore[arg-type]
    assert bases.load("tiny", folder=folder).pipe.feature_extractor is None


@pytest.mark.parametrize(("download", "kind", "words"), [
    (False, UnknownBase, "base 'sdxl' is not on this machine: set base_folder to a copy of stabilityai/stable-diffusion-xl-base-1.0 .* or base_hub = true"),
    (True, ServerUnreachable, "the Hub does not answer: check the network and HF_HUB_OFFLINE, or set base_folder"),
])
def test_without_a_network_the_cure_is_a_folder(tmp_path: Path, download: bool, kind: type[LikenessError], words: str) -> None:
    with pytest.raises(kind, match=words):            # huggingface_hub itself answers here, in its offline mode
        hub.place("sdxl", folder=None, cache=tmp_path / "bases", download=download)
    assert not (tmp_path / "bases").exists()


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/"))


@pytest.mark.parametrize(("error", "kind", "words"), [
    (GatedRepoError("no", response=RESPONSE), UnknownBase, "accept its terms there and set HF_TOKEN"), (RevisionNotFoundError("no", response=RESPONSE), UnknownBase, "base_folder"),
    (httpx.ReadTimeout("slow"), ServerUnreachable, "may work in a moment"), (OSError(errno.ENOSPC, "full"), ResourceError, "the disk is full while downloading base 'sd15'"),
])
def test_every_failure_of_the_hub_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[LikenessError], words: str) -> None:
    def fail(repository: str, **more: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(kind, match=words):
        hub.place("sd15", folder=None, cache=tmp_path, download=True)


def test_a_snapshot_that_lacks_a_part_is_refused_before_it_is_loaded(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = hub.place("tiny", folder=None, cache=tmp_path, download=True)
    assert folder is not None
    (folder / "text_encoder_2" / "model.safetensors").rename(folder / "text_encoder_2" / "pytorch_model.bin")
    with pytest.raises(UnknownBase, match="no safetensors in text_encoder_2/: pickled weights are never read"):
        bases.reference("tiny", folder=folder)
