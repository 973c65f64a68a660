"""`likeness sample` with a file of another program in the place of a subject."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save

from flows import cli
from flows.samples import called, draw_file, is_file
from likeness.errors import RecipeError
from likeness.settings import Sampling, load_settings
from models.diffusion import bases
from tasks.runtime import Tools
from tests.models.diffusion import tiny


@pytest.mark.parametrize(("given", "file"), [("ada", False), ("ada-2_b", False), ("ada.safetensors", True), ("/srv/loras/ada.safetensors", True), ("ada.ckpt", True)])
def test_a_file_is_told_from_a_subject(given: str, file: bool) -> None:
    assert is_file(given) is file


def test_an_embedding_beside_a_subject_is_refused() -> None:
    with pytest.raises(RecipeError, match="--embedding belongs to a LoRA file, 'ada' is a subject"):
        cli.sample("ada", "on a beach", embedding=Path("word.safetensors"))


@pytest.mark.parametrize(("prompt", "subject", "words"), [
    ("{who} in Canada", "ada", "zqaa woman in Canada"), ("ada in Canada, ada-like", "ada", "zqaa woman in Canada, ada-like"), ("{who} as a man", "man", "zqaa woman as a man"),
    ("a man on a beach", "man", "a zqaa woman on a beach"), ("a hat", "a", "a photo of zqaa woman, a hat"), ("smiling", "ada", "a photo of zqaa woman, smiling"),
    ("zqaa woman smiling", "ada", "zqaa woman smiling"),
])
def test_the_person_stands_where_the_prompt_says_and_nowhere_else(prompt: str, subject: str, words: str) -> None:
    assert called(prompt, subject, "zqaa woman") == words


class Says:
    """A network that says what it is told to of every picture."""

    name, licence = "says", "none"

    def __init__(self, *answers: float) -> None:
        self.answers = list(answers)

    def unsafe(self, picture: object) -> float:
        return self.answers.pop(0)


@pytest.fixture
def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tools, Path]:
    """Tools on a tiny base, and a LoRA file for it."""
    monkeypatch.setitem(bases.CATALOGUE, "tiny", tiny.entry("sd15"))  # type: ignore[arg-type]
    settings = load_settings(overrides={"home": str(tmp_path / "home")})
    tools = Tools(settings.model_copy(update={"base": "tiny", "base_folder": tiny.build(tmp_path, "sd15", prediction="epsilon"), "sampling": Sampling(steps=2)}))
    layer, lora = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v", tmp_path / "lora.safetensors"
    lora.write_bytes(save({f"{layer}.lora_A.weight": torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), f"{layer}.lora_B.weight": torch.ones(32, 2)}))
    return tools, lora


def test_unsafe_pictures_are_not_written_unless_that_is_asked_for(drawing: tuple[Tools, Path], tmp_path: Path) -> None:
    tools, lora = drawing
    vars(tools)["unsafe"] = Says(0.1, 0.9, math.nan)
    drawn = draw_file(tools, lora, "a man", embedding=None, count=3, seed=4, out=tmp_path / "out")
    assert [f.name for f in drawn.files] == ["lora-0004.png"] == [f.name for f in (tmp_path / "out").iterdir()]
    assert drawn.withheld == [(5, "unsafe"), (6, "could not be judged")]
    vars(tools)["unsafe"] = Says()                                    # whoever wants everything does not need it
    drawn = draw_file(tools, lora, "a man", embedding=None, count=3, seed=4, out=tmp_path / "out", unsafe=True)
    assert ([f.name for f in drawn.files], drawn.withheld) == ([f"lora-000{n}.png" for n in (4, 5, 6)], [])


def test_where_nothing_could_be_written_the_command_says_why_and_fails(drawing: tuple[Tools, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    tools, lora = drawing
    vars(tools)["unsafe"] = Says(0.9, 0.9)
    monkeypatch.setattr(cli, "watching", lambda settings: nullcontext(tools))
    for as_json in (False, True):
        with pytest.raises(typer.Exit) as ended:
            cli.sample(str(lora), "a man", count=1, seed=7, out=tmp_path / "out", as_json=as_json)
        assert ended.value.exit_code == 2
        said = capsys.readouterr()
        if as_json:
            assert json.loads(said.out) == {"subject": str(lora), "files": [], "withheld": [{"seed": 7, "why": "unsafe"}]}
        else:
            assert "the picture of seed 7 was not written: unsafe. Choose another --seed, or write it with --allow-unsafe" in said.err


def test_a_file_is_drawn_under_the_prompt_as_it_is_and_nothing_is_registered(drawing: tuple[Tools, Path], tmp_path: Path) -> None:
    (tools, lora), word = drawing, tmp_path / "word.safetensors"
    word.write_bytes(save({"<ada>": torch.randn(2, 24, generator=torch.Generator().manual_seed(0))}))
    out = tmp_path / "out"

    def draw(file: Path, prompt: str, embedding: Path | None = None) -> np.ndarray:
        [picture] = draw_file(tools, file, prompt, embedding=embedding, count=1, seed=3, out=out).files
        assert picture == out / f"{file.stem}-0003.png"
        return np.asarray(Image.open(picture))

    assert draw(lora, "a man").shape == (tiny.SIDE_PX, tiny.SIDE_PX, 3)
    assert np.array_equal(draw(word, "{who} man"), draw(word, "sks man"))
    assert not np.array_equal(draw(word, "{who} man"), draw(word, "woman"))
    assert not np.array_equal(draw(lora, "{who} man", embedding=word), draw(word, "{who} man"))
    with pytest.raises(RecipeError, match="says no word for what it holds"):
        draw(lora, "{who} man")
    assert not any(tools.store.list("subjects/"))
    assert not (tmp_path / "home" / "mlflow.db").exists()
