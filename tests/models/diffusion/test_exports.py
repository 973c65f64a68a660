"""Exports, read back by the programs that they are for: the same noise gives the same latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load

from likeness.errors import RecipeError
from likeness.recipe import DreamBooth, Lora, Pivotal, Recipe, TextualInversion
from models.diffusion import bases
from models.diffusion.batches import encode
from models.diffusion.exports import embedding_file, lora_file, write_pipeline, write_vae
from models.diffusion.methods import adapted, as_file, step_of, train
from models.maquette.companions import read_class_pictures

LORA = Lora(rank=2, alpha=1.0, targets=("attention", "convolution", "text_encoder"))
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def base() -> bases.Base:
    torch.set_num_threads(1)
    return bases.load("maquette", device="cpu")


@pytest.fixture
def foreign() -> Any:
    """A pipeline as another program would load it."""
    pipe = StableDiffusionPipeline.from_pretrained(str(bases.MAQUETTE / "weights"), dtype=torch.float32, local_files_only=True, safety_checker=None,
                                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def changed(base: bases.Base, recipe: Recipe) -> dict[str, torch.Tensor]:
    """An adapter of this recipe that changes pictures visibly, as its file has it: factors, vectors and differences drawn by chance."""
    pictures, captions = read_class_pictures("woman", side_px=128)
    inputs = encode(base, crops_NSSC=pictures[:1], masks_NSS=pictures[:1, ..., 0], captions=["zqaa woman"], class_images_MSSC=pictures[1:2],
                    class_captions=captions[1:2], noun="woman")
    step = step_of(base, inputs, recipe)
    tensors = step.export()
    step.close()
    g = torch.Generator().manual_seed(0)
    return as_file({k: v + (0.003 if k.startswith("delta.") else 0.1) * torch.randn(v.shape, generator=g) for k, v in tensors.items()})


def latents(pipe: Any, prompt: str) -> torch.Tensor:
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    return pipe([prompt], latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="latent").images


def latents_of(base: bases.Base, prompt: str) -> torch.Tensor:
    """What Likeness's own sampler gives the pipeline."""
    return latents(base.pipe, base.spell(prompt))


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_file_draws_the_same_in_a_plain_pipeline(base: bases.Base, foreign: Any, tmp_path: Path, form: str) -> None:
    tensors = changed(base, LORA)
    with adapted(base, tensors, LORA):
        wanted = latents(base.pipe, "zqaa woman")
    plain = latents(foreign, "zqaa woman")
    assert (plain - wanted).abs().max() > 0.1
    (tmp_path / "ada.safetensors").write_bytes(lora_file(tensors, LORA, form, family="sd15"))
    foreign.load_lora_weights(str(tmp_path), weight_name="ada.safetensors")
    assert torch.allclose(latents(foreign, "zqaa woman"), wanted, atol=2e-4)


def test_kohyas_names_are_kohyas(base: bases.Base) -> None:
    names = load(lora_file(changed(base, LORA), LORA, "kohya", family="sd15"))
    assert {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight", "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"} <= names.keys()
    assert {k.rpartition(".")[0].removesuffix(".lora_down").removesuffix(".lora_up") + ".alpha" for k in names if k.endswith("weight")} == {k for k in names if k.endswith("alpha")}


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_is_the_same_word_in_a_plain_pipeline(base: bases.Base, foreign: Any, tmp_path: Path, count: int) -> None:
    recipe = TextualInversion(vectors=count)
    tensors = changed(base, recipe)
    with adapted(base, tensors, recipe):
        wanted = latents_of(base, "a photo of zqaa woman")
    (tmp_path / "ada.safetensors").write_bytes(embedding_file(tensors, recipe, token="<ada>"))
    foreign.load_textual_inversion(str(tmp_path), weight_name="ada.safetensors")
    assert torch.allclose(latents(foreign, "a photo of <ada> woman"), wanted, atol=1e-5)
    assert (latents(foreign, "a photo of zqaa woman") - wanted).abs().max() > 0.01


def test_both_halves_of_pivotal_tuning_draw_the_same_together(base: bases.Base, foreign: Any, tmp_path: Path) -> None:
    recipe = Pivotal(rank=2, alpha=2.0, targets=("attention",), vectors=2)
    tensors = changed(base, recipe)
    with adapted(base, tensors, recipe):
        wanted = latents_of(base, "zqaa woman")
    (tmp_path / "lora.safetensors").write_bytes(lora_file(tensors, recipe, "diffusers", family="sd15"))
    (tmp_path / "word.safetensors").write_bytes(embedding_file(tensors, recipe, token="<ada>"))
    foreign.load_textual_inversion(str(tmp_path), weight_name="word.safetensors")
    foreign.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert torch.allclose(latents(foreign, "<ada> woman"), wanted, atol=2e-4)


def test_a_dreambooth_adapter_becomes_a_whole_pipeline(base: bases.Base, tmp_path: Path) -> None:
    recipe = DreamBooth(text_encoder=True)
    tensors = changed(base, recipe)
    with adapted(base, tensors, recipe):
        wanted = latents(base.pipe, "zqaa woman")
    plain = latents(base.pipe, "zqaa woman")
    write_pipeline(base, tensors, recipe, tmp_path / "ada")
    assert torch.equal(latents(base.pipe, "zqaa woman"), plain)
    pipe = StableDiffusionPipeline.from_pretrained(str(tmp_path / "ada"), local_files_only=True, use_safetensors=True, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(pipe, "zqaa woman"), wanted, atol=1e-5)
    assert (plain - wanted).abs().max() > 0.1


def test_a_tuned_decoder_leaves_as_a_vae_and_not_in_a_lora_file(base: bases.Base, tmp_path: Path) -> None:
    recipe = Lora(steps=1, batch=1, rank=2, decoder_steps=3)
    pictures, captions = read_class_pictures("woman", side_px=128)
    inputs = encode(base, crops_NSSC=pictures[:1], masks_NSS=pictures[:1, ..., 0], captions=["zqaa woman"], class_images_MSSC=pictures[1:2],
                    class_captions=captions[1:2], noun="woman")
    tensors = as_file(train("ada", base, inputs, recipe).tensors)
    assert all(name.startswith("unet.") for name in load(lora_file(tensors, recipe, "diffusers", family="sd15")))
    write_vae(base, tensors, recipe, tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(str(tmp_path / "vae"), local_files_only=True, use_safetensors=True)
    with torch.no_grad(), adapted(base, tensors, recipe):
        assert torch.allclose(vae.decode(inputs.latents_NCHW).sample, base.pipe.vae.decode(inputs.latents_NCHW).sample, atol=1e-5)
    with pytest.raises(RecipeError, match="has none"):
        write_vae(base, {}, Lora(), tmp_path / "none")


@pytest.mark.parametrize(("recipe", "form", "words"), [
    (TextualInversion(), "diffusers", "textual_inversion adapter has none: choose embedding"), (TextualInversion(), "kohya", "choose embedding"),
    (DreamBooth(), "kohya", r"choose diffusers \(a whole pipeline\)"), (DreamBooth(), "embedding", "choose diffusers"),
    (Lora(), "embedding", "lora adapter has none: choose diffusers or kohya"),
])
def test_a_format_that_does_not_fit_the_method_is_refused_with_one_that_does(recipe: Recipe, form: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        embedding_file({}, recipe, token="<ada>") if form == "embedding" else lora_file({}, recipe, form, family="sd15")
