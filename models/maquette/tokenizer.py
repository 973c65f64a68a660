"""The maquette's own byte-pair tokenizer, as CLIPTokenizer files.

Trained on the vocabulary's captions, so every word that the maquette knows is one token; any other text still encodes, as bytes.
The trigger words of `vocabulary.TRIGGERS` are one token each.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from models.maquette.vocabulary import HAIR_COLOURS, SLOTS, TRIGGERS, slot_prompt, training_caption

MAX_TOKENS = 60      # the longest training caption has 57
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`, trained there first if it is not yet. Deterministic."""
    if not (folder / "tokenizer_config.json").exists():
        _train(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _corpus() -> list[str]:
    """Captions that hold every word of the vocabulary, each many times."""
    rng = random.Random(0)
    words = [slot_prompt(slot, value, noun=noun) for slot in SLOTS for value in SLOTS[slot].phrases for noun in ("person", "man", "woman")]
    captions = []
    for _ in range(4000):
        a = {slot: rng.choice(list(SLOTS[slot].phrases)) for slot in SLOTS}
        a |= {"hat_colour": rng.choice(HAIR_COLOURS), "second_colour": a["colour"], "place_colour": a["colour"], "hair_changed": "false",
              "pattern": rng.choice(["plain", "striped", "checked", "polka dot", "ribbed"])}
        captions.append(training_caption(a, rng))
    # Far more of each trigger than of the one before: between pairs that are equally frequent the trainer chooses at random.
    return words * 20 + captions + [f"a photo of {t} person" for n, t in enumerate(TRIGGERS, 1) for _ in range(40 * n)]


def _train(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern=_regex(), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=20, initial_alphabet=alphabet, end_of_word_suffix="</w>", special_tokens=[], show_progress=False)
    bpe.train_from_iterator(_corpus(), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate(alphabet + [c + "</w>" for c in alphabet])}
    for left, right in learnt["merges"]:
        vocab.setdefault(left + right, len(vocab))
    vocab[BOS], vocab[EOS] = len(vocab), len(vocab) + 1
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in learnt["merges"]))
    CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS,
                  model_max_length=MAX_TOKENS).save_pretrained(folder)


def _regex() -> Regex:
    return Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
