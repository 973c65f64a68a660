"""Stages `clip` and `tower`: both towers of CLIP, contrastively; then the image tower alone, against the text tower as it is by then.

The loss has two terms. The first is CLIP's own (arXiv 2103.00020): pictures against whole captions. The second is the same with the
phrases of one slot as the candidates, which is what zero-shot classification will do, so that few samples suffice. The UNet listens to
the text tower, so `unet` may begin when `clip` is done, while `tower` goes on: locking the text tower (arXiv 2111.07991) leaves its states as
the UNet knows them, and its embeddings need computing only once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from models.maquette import data, tokenizer
from models.maquette.training import Place, Plan, Trained, adamw, fit, pixels, split
from models.maquette.vocabulary import SLOTS, slot_prompt, training_caption

SLOT_WEIGHT = 4.0      # the mean over slots moves far less than the loss over captions


def new_clip(plan: Plan, words: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel of the plan's size with both towers alike; 8 x 8 patches.

    Patches start out knowing where they are. CLIP's own positions start fourteen times weaker than the patches themselves, and after 90,000
    samples the tower still saw colours and places but neither glasses nor hats (docs/log.md, 2026-11-25).
    """
    common = dict(hidden_size=plan.clip_width, intermediate_size=4 * plan.clip_width, num_hidden_layers=plan.clip_layers,
                  num_attention_heads=max(2, plan.clip_width // 64), projection_dim=plan.clip_width, hidden_act="gelu")
    text = common | dict(vocab_size=len(words), max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id,
                         eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    patch_px = max(4, plan.side_px // 8)
    vision = common | dict(image_size=plan.side_px, patch_size=patch_px)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=plan.clip_width))
    with torch.no_grad():
        clip.vision_model.embeddings.position_embedding.weight[1:] = grid_positions(plan.side_px // patch_px, plan.clip_width)
    return clip


def grid_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column (side * side, width), as arXiv 2205.01580 uses them, half of their size."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    waves = [wave(axis.reshape(-1, 1) * rates) for axis in (y, x) for wave in (torch.sin, torch.cos)]
    return 0.5 * torch.cat(waves, 1)


def load_clip(plan: Plan, place: Place) -> tuple[CLIPModel, CLIPTokenizer]:
    """CLIP as far as it is trained, frozen: with the image tower of `tower` if that stage has begun."""
    words = tokenizer.build(place.work / "tokenizer")
    clip = new_clip(plan, words)
    files = [f for f in (place.work / "tower.safetensors", place.work / "clip.safetensors") if f.exists()]
    clip.load_state_dict({k[6:]: v for k, v in load_file(files[0]).items() if k.startswith("model.")})
    return clip.to(place.device).eval().requires_grad_(False), words


def train_clip(plan: Plan, place: Place) -> bool:
    """Both towers. Text costs as much as pictures, so each step sees the captions of half its pictures, and half the slots."""
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    words = tokenizer.build(place.work / "tokenizer")
    torch.manual_seed(plan.seed + 1)
    clip = new_clip(plan, words).to(place.device)
    trained = Trained("clip", clip, None, adamw(clip, plan.clip_lr, decay=0.05, betas=(0.9, 0.98)))
    trained.resume(place)
    prompts = slot_tokens(words)

    def text(slots: Sequence[str]) -> dict[str, Tensor]:
        width = max(prompts[slot].shape[1] for slot in slots)
        ids = torch.cat([F.pad(prompts[slot], (0, width - prompts[slot].shape[1]), value=words.pad_token_id) for slot in slots]).to(place.device)
        parts = text_features(clip, clip.text_model(input_ids=ids).pooler_output).split([len(prompts[slot]) for slot in slots])
        return dict(zip(slots, parts, strict=True))

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 2, step])
        numbers = rng.choice(train, plan.clip_batch, replace=False)
        real, attributes, _ = augmented(crops, rows, numbers, rng, place.device)
        image = image_features(clip, real)
        half, clauses = plan.clip_batch // 2, random.Random(step)
        captions = [training_caption(a, clauses) for a in attributes[:half]]
        ids = words(captions, padding="longest", truncation=True, return_tensors="pt").input_ids.to(place.device)
        pairs = pair_loss(clip, image[:half], text_features(clip, clip.text_model(input_ids=ids).pooler_output))
        slots = slot_loss(clip, image, text([str(s) for s in rng.permutation(list(SLOTS))[: len(SLOTS) // 2]]), attributes)
        return {"loss": pairs + SLOT_WEIGHT * slots, "pairs": pairs, "slots": slots}

    def sheet(step: int) -> None:
        say_accuracy(clip, crops, rows, held, text, name="clip", step=step, place=place)

    return fit(trained, place, steps=plan.clip_samples // plan.clip_batch, lr=plan.clip_lr, loss_of=loss_of, sheet=sheet, log_every=50, save_every=250)


def train_tower(plan: Plan, place: Place) -> bool:
    """The image tower and both projections, on cached text states; the text tower stays as `clip` left it."""
    crops, rows = data.load(place.work / "data")
    train, held = split(rows)
    words = tokenizer.build(place.work / "tokenizer")
    clip = new_clip(plan, words)
    clip.load_state_dict({k[6:]: v for k, v in load_file(place.work / "clip.safetensors").items() if k.startswith("model.")})
    clip.to(place.device).text_model.requires_grad_(False)
    trained = Trained("tower", clip, None, adamw(clip, plan.tower_lr, decay=0.05, betas=(0.9, 0.98)))
    trained.resume(place)
    captions = torch.from_numpy(cache_captions(plan, place, clip, words, rows)).to(place.device)
    with torch.no_grad():
        pooled = {slot: clip.text_model(input_ids=ids.to(place.device)).pooler_output for slot, ids in slot_tokens(words).items()}

    def text(slots: Sequence[str]) -> dict[str, Tensor]:
        return {slot: text_features(clip, pooled[slot]) for slot in slots}

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([plan.seed, 4, step])
        numbers = rng.choice(train, plan.clip_batch, replace=False)
        real, attributes, mirrored = augmented(crops, rows, numbers, rng, place.device)
        image = image_features(clip, real)
        which = torch.from_numpy(rng.integers(0, captions.shape[2], len(numbers)))
        pairs = pair_loss(clip, image, text_features(clip, captions[torch.from_numpy(numbers), int(mirrored), which].float()))
        slots = slot_loss(clip, image, text(list(SLOTS)), attributes)
        return {"loss": pairs + SLOT_WEIGHT * slots, "pairs": pairs, "slots": slots}

    def sheet(step: int) -> None:
        say_accuracy(clip, crops, rows, held, text, name="tower", step=step, place=place)

    return fit(trained, place, steps=plan.tower_samples // plan.clip_batch, lr=plan.tower_lr, loss_of=loss_of, sheet=sheet, log_every=100, save_every=500)


# -- what both stages do

def image_features(clip: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Normalised image features (B, D)."""
    return F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixel_values).pooler_output), dim=1)


def text_features(clip: CLIPModel, pooled: Tensor) -> Tensor:
    """Normalised text features (B, D) of the text tower's pooled states (B, W)."""
    return F.normalize(clip.text_projection(pooled), dim=1)


def _scale(clip: CLIPModel) -> Tensor:
    scale: Tensor = clip.logit_scale.clamp(max=math.log(100)).exp()
    return scale


def pair_loss(clip: CLIPModel, image: Tensor, text: Tensor) -> Tensor:
    """Each picture against all captions of the batch, and each caption against all pictures."""
    scores = (_scale(clip) * image @ text.T).float()
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def slot_loss(clip: CLIPModel, image: Tensor, text: Mapping[str, Tensor], attributes: Sequence[Mapping[str, str]]) -> Tensor:
    """Each picture against the phrases of each slot, mean over slots."""
    truth = slot_truth(attributes, list(text), image.device)
    return torch.stack([F.cross_entropy((_scale(clip) * image @ part.T).float(), truth[slot], ignore_index=-1) for slot, part in text.items()]).mean()


def slot_tokens(words: CLIPTokenizer) -> dict[str, Tensor]:
    """Token ids (values, T) of each slot's phrases, padded within the slot."""
    return {slot: words([slot_prompt(slot, value) for value in SLOTS[slot].phrases], padding="longest", return_tensors="pt").input_ids for slot in SLOTS}


def slot_truth(attributes: Sequence[Mapping[str, str]], slots: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Per slot, the number of each picture's value (B), -1 where it has none of them."""
    values = {slot: list(SLOTS[slot].phrases) for slot in slots}
    return {slot: torch.tensor([values[slot].index(a[slot]) if a[slot] in values[slot] else -1 for a in attributes], device=device) for slot in slots}


def augmented(crops: NDArray[np.uint8], rows: Sequence[dict[str, str]], numbers: NDArray[np.int64], rng: np.random.Generator,
              device: torch.device) -> tuple[Tensor, list[dict[str, str]], bool]:
    """(pixels, what they show, whether mirrored): shifted, and a little brighter or darker; sides are swapped in pictures and words together."""
    real, attributes, mirrored = pixels(crops, numbers, device), [dict(rows[i]) for i in numbers], bool(rng.random() < 0.5)
    if mirrored:
        real, attributes = real.flip(3), [mirror(a) for a in attributes]
    real = real * float(rng.uniform(0.9, 1.1)) + float(rng.uniform(-0.08, 0.08))
    dy, dx = (int(d) for d in rng.integers(-6, 7, 2))
    return torch.roll(real, (dy, dx), (2, 3)), attributes, mirrored


def mirror(attributes: Mapping[str, str]) -> dict[str, str]:
    """What the mirror image shows."""
    swapped = {"left": "right", "right": "left"}
    return {**attributes, "view": " ".join(swapped.get(word, word) for word in attributes["view"].split())}


@torch.no_grad()
def cache_captions(plan: Plan, place: Place, clip: CLIPModel, words: CLIPTokenizer, rows: Sequence[dict[str, str]]) -> NDArray[np.float16]:
    """Pooled states (N, 2, K, W) of K captions of each picture and of its mirror image, made once: `captions.npy`."""
    path = place.work / "captions.npy"
    if not path.exists():
        rng = random.Random(plan.seed)
        captions = [training_caption(a, rng) for row in rows for a in (row, mirror(row)) for _ in range(plan.captions_per_picture)]
        pooled = [clip.text_model(input_ids=words(captions[i:i + 256], padding="longest", truncation=True, return_tensors="pt").input_ids.to(place.device))
                  .pooler_output.cpu().half() for i in range(0, len(captions), 256)]
        part = path.with_suffix(".part.npy")
        np.save(part, torch.cat(pooled).view(len(rows), 2, plan.captions_per_picture, -1).numpy())
        part.rename(path)
    cached: NDArray[np.float16] = np.load(path)
    return cached


@torch.no_grad()
def say_accuracy(clip: CLIPModel, crops: NDArray[np.uint8], rows: Sequence[dict[str, str]], held: NDArray[np.int64], text: Callable[[Sequence[str]], Mapping[str, Tensor]], *, name: str, step: int,
                 place: Place) -> None:
    """Print zero-shot accuracy per slot on pictures of held-out people."""
    clip.eval()
    some = held[:: max(1, len(held) // 256)]
    image, by_slot, truth = image_features(clip, pixels(crops, some, place.device)), text(list(SLOTS)), slot_truth([rows[i] for i in some], list(SLOTS), place.device)
    right = {s: float(((image @ by_slot[s].T).argmax(1) == truth[s])[truth[s] >= 0].float().mean()) for s in SLOTS}
    print(f"{name} {step}: held-out zero-shot " + " ".join(f"{k} {v:.2f}" for k, v in right.items()) + f" | mean {sum(right.values()) / len(right):.3f}", flush=True)
    clip.train()
