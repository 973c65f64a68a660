"""Stable Diffusion 1.5 and XL at the size that they have: their real shapes, chance weights. What they draw says nothing, that they train does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from likeness.recipe import RECIPE, Lora, preset
from likeness.records import BaseRef
from models.diffusion import bases
from models.diffusion.batches import encode
from models.diffusion.exports import lora_file
from models.diffusion.loop import Job, fit
from models.diffusion.lora import Factors
from models.diffusion.methods import plan_of, step_of
from tests.models.diffusion import tiny

SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816}


def text_tower(kind: Any, width: int, layers: int, *, projection: int = 768) -> Any:
    return kind(CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
                               projection_dim=projection))


def reference(family: tiny.Family) -> BaseRef:
    return BaseRef(name=family, family=family, resolution_px=512 if family == "sd15" else 1024, prediction="epsilon", licence="none: chance", revision="0", files={})


# Of SD 1.5: 16 transformers of one block; 22 residual blocks. Of SDXL: 11 transformers with 70 blocks; 17 residual blocks. A transformer has two layers of
# its own, a block ten, a residual block two; each layer of a text tower has four.
@pytest.mark.parametrize(("family", "parameters", "layers"), [
    ("sd15", 859_520_964, {"unet": 16 * 2 + 16 * 10 + 22 * 2, "text_encoder": 12 * 4}),
    ("sdxl", 2_567_463_684, {"unet": 11 * 2 + 70 * 10 + 17 * 2, "text_encoder": 12 * 4, "text_encoder_2": 32 * 4}),
], ids=["sd15", "sdxl"])
def test_every_layer_that_is_to_learn_has_factors(family: tiny.Family, parameters: int, layers: dict[str, int]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SD15_UNET if family == "sd15" else SDXL_UNET))
        towers = {"text_encoder": text_tower(CLIPTextModel, 768, 12)}
        if family == "sdxl":
            towers["text_encoder_2"] = text_tower(CLIPTextModelWithProjection, 1280, 32, projection=1280)
        base = bases.Base(reference(family), SimpleNamespace(unet=unet, **towers), "sks", 5.0, torch.device("meta"), torch.float32)
        assert sum(p.numel() for p in unet.parameters()) == parameters
        recipe = Lora(base=family, rank=4, targets=("attention", "convolution", "text_encoder"))
        names = Factors(base, recipe, seed=0)._tensors()
    held = {k.rpartition(".lora_")[0] for k in names}
    assert {part: sum(layer.startswith(f"{part}.") for layer in held) for part in ("unet", *towers)} == layers
    kohyas = {k.partition(".")[0] for k in load(lora_file({k: torch.zeros(1) for k in names}, recipe, "kohya", family=family))}
    assert len(kohyas) == sum(layers.values())                     # no two layers under one name
    if family == "sdxl":                                           # the blocks of the original network that have attention
        assert {"_".join(k.split("_")[2:6]) for k in kohyas if "attn1_to_q" in k} == {
            *(f"input_blocks_{n}_1" for n in (4, 5, 7, 8)), "middle_block_1_transformer", *(f"output_blocks_{n}_1" for n in range(6))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sd15_at_full_size_takes_a_step_of_its_preset(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = tiny.tokenizer(tmp_path / "words", pad=tiny.EOS)
    words.model_max_length = 77
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2),
        text_encoder=text_tower(CLIPTextModel, 768, 12), tokenizer=words, unet=UNet2DConditionModel(**SD15_UNET), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1),
        requires_safety_checker=False)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    base = bases.Base(reference("sd15"), pipe, "sks", 7.0, torch.device("cpu"), torch.float32)
    before = {k: float(v.double().sum()) for k, v in pipe.unet.state_dict().items()}
    pictures = np.random.default_rng(0).integers(0, 256, (1, 512, 512, 3), np.uint8)
    inputs = encode(base, crops_NSSC=pictures, masks_NSS=np.full((1, 512, 512), 255, np.uint8), captions=["a photo of sks woman"],
                    class_images_MSSC=np.zeros((0, 512, 512, 3), np.uint8), class_captions=[], noun="woman")
    assert inputs.latents_NCHW.shape == (1, 4, 64, 64)
    assert inputs.encoded.states_BTD.shape == (3, 77, 768)
    recipe = RECIPE.validate_python({**preset("lora", "sd15"), "steps": 1}, strict=False)
    [result] = fit([Job("ada", lambda: step_of(base, inputs, recipe), plan_of(recipe), recompute=base.recompute)])
    assert result.error is None, result.error
    assert len(result.tensors) == 2 * 192
    moved = [k for k, v in result.tensors.items() if k.endswith("lora_B.weight") and v.any()]
    assert len(moved) == 192
    assert {k: float(v.double().sum()) for k, v in pipe.unet.state_dict().items()} == before
