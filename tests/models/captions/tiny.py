"""A BLIP and a Florence-2 built in code: one layer, chance weights, a few dozen words, in a folder as `save_pretrained` writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    RobertaTokenizer,
)

WORDS = ("man", "woman", "hat", "beach", "smiling", "wearing", "beard", "glasses", "red", "shirt", "street", "snow", "looking", "camera", "wall", "holding")
SIDE_PX = 32


def build(folder: Path, name: str, *, seed: int = 3) -> Path:
    """The captioner in `folder`, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, processor = _blip() if name == "blip" else _florence()
        for parameter in network.parameters():          # wide enough that chance weights tell pictures apart
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.7)
        network.save_pretrained(str(folder))
        processor.save_pretrained(str(folder))
    return folder


def _blip() -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    # the word that a description begins with is none of the tokenizer's, as in the published BLIP
    vocab = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    config = BlipConfig(text_config={"vocab_size": len(vocab) + 2, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                                     "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": len(vocab), "pad_token_id": 0,
                                     "eos_token_id": vocab["[SEP]"], "sep_token_id": vocab["[SEP]"]},
                        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE_PX, "patch_size": 8})
    return BlipForConditionalGeneration(config), BlipProcessor(BlipImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}), BertTokenizer(vocab=vocab))


def _florence() -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "<image>"))}
    words = RobertaTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    config = Florence2Config(
        vision_config={"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "embed_dim": [8, 16],
                       "num_heads": [1, 2], "num_groups": [1, 2], "window_size": 4, "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 10},
        text_config={"model_type": "bart", "vocab_size": len(vocab), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                     "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 160, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
                     "decoder_start_token_id": 2},
        image_token_id=vocab["<image>"], bos_token_id=0, pad_token_id=1, eos_token_id=2)
    pictures = CLIPImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    pictures.image_seq_length = (SIDE_PX // 8) ** 2 + 1          # 8 = the strides; one more is the mean over them
    return Florence2ForConditionalGeneration(config), Florence2Processor(pictures, words)
