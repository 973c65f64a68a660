"""Pipelines of the classes of Stable Diffusion 1.5 and XL, built in code: two blocks, chance weights, 16 px, in a folder in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.diffusion.bases import Entry

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SIDE_PX, TOKENS = 16, 20
Family = Literal["sd15", "sdxl"]


def entry(family: Family) -> Entry:
    """The catalogue's line for such a pipeline."""
    return Entry(family, SIDE_PX, "epsilon", "none: chance", "sks", 3.0)


def build(folder: Path, family: Family, *, prediction: str, layers: int = 1) -> Path:
    """The pipeline in `folder`, with so many layers in a block of its UNet (the real ones have 2); the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), latent_channels=4,
                            norm_num_groups=4)
        common: dict[str, Any] = {"sample_size": 8, "layers_per_block": layers, "block_out_channels": (16, 32), "norm_num_groups": 8,
                                  "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, clip_sample=False,
                                  set_alpha_to_one=False, steps_offset=1)
        words = tokenizer(folder / "words", pad=EOS)
        if family == "sd15":
            pipe: Any = StableDiffusionPipeline(
                vae=vae, text_encoder=CLIPTextModel(_text(words, 24)), tokenizer=words, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False, unet=UNet2DConditionModel(cross_attention_dim=24, attention_head_dim=4, **common))
        else:
            more = tokenizer(folder / "words_2", pad="!")
            second = _text(more, 40)
            second.eos_token_id = 2                    # as the second tower of SDXL has it, and it is not true
            unet = UNet2DConditionModel(cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=1,
                                        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=40 + 6 * 8, **common)
            pipe = StableDiffusionXLPipeline(
                vae=vae, text_encoder=CLIPTextModel(_text(words, 24)), text_encoder_2=CLIPTextModelWithProjection(second), tokenizer=words, tokenizer_2=more,
                unet=unet, scheduler=scheduler, add_watermarker=False)
        pipe.save_pretrained(str(folder / "pipeline"), safe_serialization=True)
    return folder / "pipeline"


def tokenizer(folder: Path, *, pad: str) -> CLIPTokenizer:
    """A byte-pair tokenizer that knows three words, and any other by its letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "k"), ("sk", "s</w>"), ("m", "a"), ("ma", "n</w>"), ("w", "o"), ("wo", "man</w>")]
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), BOS, EOS])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=pad,
                         model_max_length=TOKENS)


def _text(words: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, projection_dim=width,
                          max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
