"""The reference scripts of huggingface/diffusers, unmodified, over the maquette: how they are found, checked, started, and their results put into a base.

They are not part of this repository: a folder named by REFERENCE_SCRIPTS holds them, and each must have the sha256 below.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image

from bench.spent import Spent, run_measured
from models.diffusion import bases
from models.diffusion.bases import Base

TAG, COMMIT = "v0.40.0", "d035dcd7cc7c88e0a154609b62887d50bba9fdc2"
SHA256: Mapping[str, str] = {
    "train_dreambooth_lora.py": "97cf38b184cad2cc39e414f79b3f1a70cec3b97883350a4d2a3aa0e2533d7883",
    "train_dreambooth.py": "4474ee28643acdc3b5e6fa01c1b3d97df55b754b7cbd88f48e9253fb4ea82803",
    "textual_inversion.py": "117c575fb59a1150dd0e95faab23d92eb9031b55e2e9f4f63413647fa1f14a99",
}
WORD = "<zqaa>"        # Textual Inversion adds a token of its own and refuses one that is there, such as our trigger


class NoScripts(ValueError):
    """The scripts are not there, or are not what they should be."""


@dataclass(frozen=True)
class Rival:
    """One script and its numbers. Whatever is not named here or in `arguments` has the script's own default.

    Attributes:
        keeps_class: it has prior preservation, and is given our class pictures for it.
        rate: learning rate; that of ours for the same method on the maquette, until a search finds a better one.
        rates: what `--rates` tries, so that a script is given its best.
        checkpoint_every: None leaves it at its default, beyond the last step.
    """

    script: str
    rate: float
    rates: tuple[float, ...]
    keeps_class: bool
    checkpoint_every: int | None = None

    def at(self, rate: float) -> Rival:
        return replace(self, rate=rate)

    def pictures(self, batch: int) -> int:
        """Of one step: portraits, and as many class pictures."""
        return batch * (2 if self.keeps_class else 1)

    def who(self, trigger: str, noun: str) -> str:
        """What stands for the person in a prompt: what the script was told to learn."""
        return f"{trigger} {noun}" if self.keeps_class else WORD

    def arguments(self, *, trigger: str, noun: str, steps: int, batch: int, seed: int, side_px: int, class_count: int) -> list[str]:
        """Everything but places. The schedule is what the examples have, validation is off."""
        every = ["--resolution", str(side_px), "--train_batch_size", str(batch), "--max_train_steps", str(steps), "--learning_rate", f"{self.rate:g}",
                 "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--seed", str(seed)]
        if self.checkpoint_every is not None:
            every += ["--checkpointing_steps", str(self.checkpoint_every)]
        if not self.keeps_class:
            return [*every, "--placeholder_token", WORD, "--initializer_token", noun, "--learnable_property", "object"]
        return [*every, "--instance_prompt", f"a photo of a {trigger} {noun}", "--with_prior_preservation", "--prior_loss_weight", "1.0",
                "--class_prompt", f"a photo of a {noun}", "--num_class_images", str(class_count)]


RIVALS: Mapping[str, Rival] = {
    "lora": Rival("train_dreambooth_lora.py", 3e-3, (1e-4, 1e-3, 3e-3, 1e-2), True, checkpoint_every=50),
    "dreambooth": Rival("train_dreambooth.py", 3e-4, (1e-4, 3e-4, 1e-3), True),
    "textual_inversion": Rival("textual_inversion.py", 5e-3, (1e-3, 5e-3, 2e-2), False),
}


def scripts_folder(named: str | None) -> Path:
    """The folder of the reference scripts, every one of them checked.

    Raises:
        NoScripts: none is named, or a script is missing or altered; the message says how to get them.
    """
    how = (f"copy {', '.join(SHA256)} from examples/dreambooth and examples/textual_inversion of https://github.com/huggingface/diffusers at tag {TAG} "
           f"(commit {COMMIT}) into one folder and name it: REFERENCE_SCRIPTS=FOLDER make bench-methods")
    if not named:
        raise NoScripts(f"the reference scripts are not part of this repository: {how}")
    folder = Path(named)
    for name, expected in SHA256.items():
        if not (folder / name).is_file():
            raise NoScripts(f"{name} is not in the folder that REFERENCE_SCRIPTS names: {how}")
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise NoScripts(f"{name} is not that of {TAG}: its sha256 is {found}, {expected} is needed; {how}")
    return folder


def write_base(base: Base, folder: Path) -> None:
    """The base in fp32 in diffusers layout: the scripts do not all cast what they load, and the packaged weights are fp16."""
    base.pipe.save_pretrained(str(folder), safe_serialization=True)


def write_pictures(images_NSSC: NDArray[np.uint8], folder: Path) -> None:
    """PNGs, one a picture."""
    folder.mkdir()
    for number, image in enumerate(images_NSSC):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


def train_rival(rival: Rival, folder: Path, *, scripts: Path, base: Path, arguments: list[str], crops_NSSC: NDArray[np.uint8],
                class_images_MSSC: NDArray[np.uint8]) -> Spent:
    """Run the script; what it trained is then in `folder`, and nothing else of the pipeline."""
    write_pictures(crops_NSSC, folder / "portraits")
    places = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(folder / "out")]
    if rival.keeps_class:
        write_pictures(class_images_MSSC, folder / "class")
        places += ["--instance_data_dir", str(folder / "portraits"), "--class_data_dir", str(folder / "class")]
    else:
        places += ["--train_data_dir", str(folder / "portraits")]
    spent = run_measured([sys.executable, str(scripts / rival.script), *places, *arguments], log=folder / "log.txt", cwd=folder, env=quiet(folder))
    for part in ("vae", "text_encoder", "tokenizer", "portraits", "class", "home", "logs"):          # what is the base's, or was given
        for place in (folder / part, folder / "out" / part):
            shutil.rmtree(place, ignore_errors=True)
    for state in (folder / "out").rglob("checkpoint-*/*"):
        if state.name != "pytorch_lora_weights.safetensors":
            state.unlink()               # optimizer and random states, some of them pickled: never read
    return spent


def quiet(folder: Path) -> dict[str, str]:
    """An environment without network, and without the user's own configuration of accelerate."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])}


def base_with(rival: Rival, trained: Path, *, step: int | None = None) -> Base:
    """A base of its own with what the script trained in place, loaded as diffusers documents it; `step` names a checkpoint of the LoRA script."""
    base = bases.load("maquette")
    out, pipe = trained / "out", base.pipe
    if rival.script == "train_dreambooth_lora.py":
        pipe.load_lora_weights(str(out if step is None else out / f"checkpoint-{step}"), weight_name="pytorch_lora_weights.safetensors")
    elif rival.script == "train_dreambooth.py":
        learnt: Any = UNet2DConditionModel.from_pretrained(str(out / "unet"), use_safetensors=True)
        pipe.unet.load_state_dict(learnt.state_dict())
    else:
        pipe.load_textual_inversion(str(out / "learned_embeds.safetensors"), token=WORD)
    return base
