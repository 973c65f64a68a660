"""Captions by a network that describes pictures: BLIP (arXiv 2201.12086) or Florence-2 (arXiv 2311.06242), as transformers has them.

The network lies in a local folder, or at a pinned commit of the Hub; safetensors only, code in the folder never runs. Decoding is greedy, so the same crops
are described in the same words. What it says is cut down to what must stay editable (`models.captions.editable`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import BlipForConditionalGeneration, BlipProcessor, Florence2ForConditionalGeneration, Florence2Processor
from transformers.utils import logging as transformers_logging

from likeness.errors import RecipeError, is_out_of_memory, translated
from models.captions.captioner import Said
from models.captions.editable import about, editable
from models.diffusion.bases import READ
from models.diffusion.hub import snapshot
from models.faces.weights import sha256_of

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5"}
BATCH = 8                    # crops described at once


@dataclass(frozen=True)
class Kind:
    """A class of networks that describe pictures.

    Attributes:
        network, processor: transformers' own classes.
        instruction: what it is asked, None where it can only describe.
        most: tokens of a description at most.
        cure: where a copy that these classes can load comes from.
    """

    network: Any
    processor: Any
    instruction: str | None
    most: int
    cure: str


KINDS: Mapping[str, Kind] = {
    "blip": Kind(BlipForConditionalGeneration, BlipProcessor, None, 40, "a folder written by BlipForConditionalGeneration.save_pretrained and BlipProcessor.save_pretrained"),
    "florence": Kind(Florence2ForConditionalGeneration, Florence2Processor, "<DETAILED_CAPTION>", 120,
                     "a folder for transformers' own Florence-2 classes (not one that brings its own code)"),
}


def place(*, folder: Path | None, hub: str | None, cache: Path) -> Path:
    """Where the captioner lies: the folder that was named, or the snapshot of "owner/name@commit", downloaded once into `cache`.

    Raises:
        RecipeError: the Hub does not give it to us.
        ServerUnreachable: the Hub does not answer.
    """
    if folder is not None:
        return folder
    repository, _, commit = (hub or "").partition("@")
    return snapshot(repository, commit, cache=cache, download=True, files=["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt"], what=f"captioner {repository!r}",
                    own="set backends.captions_folder to a copy of it (safetensors)", allow="backends.captions_hub", absent=RecipeError)


def files_of(name: str, folder: Path) -> dict[str, str]:
    """The sha256 of each file that a captioner is made of, after a look whether it is one of its kind.

    Raises:
        RecipeError: it is not, or its weights are pickled.
    """
    if not folder.is_dir():
        raise RecipeError(f"captioner {name!r}: backends.captions_folder is {folder.name!r}, which is no folder here: name {KINDS[name].cure}")
    try:
        described = json.loads((folder / "config.json").read_text())
        found = described["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(f"captioner {name!r}: its folder holds no config.json that names a model_type: name {KINDS[name].cure}") from None
    wanted = KINDS[name].network.config_class.model_type
    if found != wanted:
        raise RecipeError(f"captioner {name!r} is a {wanted!r}, its folder holds a {found!r}: name the captioner that it is, or another folder")
    files = {p.name: sha256_of(p) for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in READ}
    if not any(file.endswith(".safetensors") for file in files):
        pickled = next((p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES), None)
        raise RecipeError(f"captioner {name!r}: its folder holds no safetensors{f', but {pickled}' if pickled else ''}: pickled weights are never read; on a machine where "
                          "you trust them, load them with transformers and write them with save_pretrained, then name that folder")
    return files


@dataclass
class ImageToText:
    """A resident captioner: fp32 on CPU, bf16 on GPU."""

    name: str
    files: dict[str, str]
    network: Any
    processor: Any
    device: torch.device
    wide: ClassVar[bool] = True

    @staticmethod
    def load(name: str, folder: Path, *, device: str | None = None) -> ImageToText:
        """Read a captioner of KINDS from its folder.

        Raises:
            RecipeError: the folder is not such a captioner, or a part of it is missing or cannot be read.
        """
        kind, files = KINDS[name], files_of(name, folder)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        transformers_logging.disable_progress_bar()       # the bars of a run are ours
        with translated(f"loading captioner {name!r}"):
            try:
                network, info = kind.network.from_pretrained(str(folder), dtype=torch.bfloat16 if where.type == "cuda" else torch.float32, local_files_only=True,
                                                             use_safetensors=True, trust_remote_code=False, output_loading_info=True)
                processor = kind.processor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as e:
                if (isinstance(e, RuntimeError) and is_out_of_memory(e)) or getattr(e, "errno", None) is not None:
                    raise
                raise RecipeError(f"captioner {name!r} cannot be loaded from its folder ({type(e).__name__}): a file is damaged, missing or of another program; name {kind.cure}") from e
        lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if lacking:
            raise RecipeError(f"captioner {name!r}: its folder holds no weights for {lacking[0]} and {len(lacking) - 1} more, which chance would fill: name {kind.cure}")
        return ImageToText(name, files, network.eval().requires_grad_(False).to(where), processor, where)

    @torch.no_grad()
    def describe(self, crops_NSSC: NDArray[np.uint8]) -> list[str]:
        """What the network says of each uint8 RGB crop, greedily, in its own words."""
        kind, said = KINDS[self.name], []
        for start in range(0, len(crops_NSSC), BATCH):
            crops = list(crops_NSSC[start:start + BATCH])
            asked = {} if kind.instruction is None else {"text": [kind.instruction] * len(crops)}
            given = self.processor(images=crops, return_tensors="pt", **asked).to(self.device, self.network.dtype)
            tokens = self.network.generate(**given, do_sample=False, num_beams=1, max_new_tokens=kind.most)
            said += [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
        return said

    def captions(self, crops_NSSC: NDArray[np.uint8], *, who: str) -> list[Said]:
        """For each crop, what must stay editable of its description."""
        return [(about(who, editable(said)), {}, "image_to_text") for said in self.describe(crops_NSSC)]
