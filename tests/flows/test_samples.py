"""`likeness sample` with a file of another program in the place of a subject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from flows import cli
from flows.samples import draw_file, is_file
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


def test_a_file_is_drawn_under_the_prompt_as_it_is_and_nothing_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bases.CATALOGUE, "tiny", tiny.entry("sd15"))  # type: ignore[arg-type]
    folder = tiny.build(tmp_path, "sd15", prediction="epsilon")
    settings = load_settings(overrides={"home": str(tmp_path / "home")})
    tools = Tools(settings.model_copy(update={"base": "tiny", "base_folder": folder, "sampling": Sampling(steps=2)}))
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    lora, word = tmp_path / "lora.safetensors", tmp_path / "word.safetensors"
    lora.write_bytes(save({f"{layer}.lora_A.weight": torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), f"{layer}.lora_B.weight": torch.ones(32, 2)}))
    word.write_bytes(save({"<ada>": torch.randn(2, 24, generator=torch.Generator().manual_seed(0))}))
    out = tmp_path / "out"

    def draw(file: Path, prompt: str, embedding: Path | None = None) -> np.ndarray:
        [picture] = draw_file(tools, file, prompt, embedding=embedding, count=1, seed=3, out=out)
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
