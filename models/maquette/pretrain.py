"""Pre-train the maquette: a Stable Diffusion pipeline in miniature, from captioned portraits.

    python -m models.maquette.pretrain all --data DIR_OR_TAR ... --work WORK --out OUT --plan cpu

Six stages, each resumable at any step, each a short file: `prepare` (aligned crops: data.py), `vae` (train_vae.py), `clip` (both towers,
contrastive, and the tokenizer: train_clip.py), `unet` (v-prediction on cached latents: train_unet.py), `decoder` (the VAE's decoder alone), `tower` (CLIP's image tower alone:
train_clip.py), then `export` (fp16 safetensors that plain `StableDiffusionPipeline.from_pretrained` loads). The loop they share is in
training.py. `vae` and `clip` may run at the same time, and so may `unet`, `decoder` and
`tower`. The plan says how large and how long.
Plain torch, diffusers and transformers: nothing here knows of Prefect or MLflow.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

from models.diffusion import bases
from models.maquette import data
from models.maquette.train_clip import load_clip, train_clip, train_tower
from models.maquette.train_unet import new_scheduler, new_unet, train_unet
from models.maquette.train_vae import load_vae, train_decoder, train_vae
from models.maquette.training import PLANS, Place, Plan


def export(plan: Plan, place: Place, out: Path) -> None:
    """Write the pipeline as fp16 safetensors in shards under 16 MB, and the whole CLIP beside it; load both to prove it."""
    scale = json.loads((place.work / "scaling.json").read_text())["scaling_factor"]
    vae = load_vae(plan, place)
    vae.register_to_config(scaling_factor=scale)
    clip, words = load_clip(plan, place)
    text = CLIPTextModel(clip.config.text_config)
    weights = clip.text_model.state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in text.state_dict()) else ""      # transformers 5 dropped the level
    text.load_state_dict({prefix + k: v for k, v in weights.items()})
    unet = new_unet(plan)
    tensors = load_file(place.work / "unet.safetensors")
    unet.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    target = out.with_name(out.name + ".part")
    shutil.rmtree(target, ignore_errors=True)
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=new_scheduler(), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.to(torch.float16).save_pretrained(target, max_shard_size="14MB")
    clip.half().save_pretrained(target / "clip", max_shard_size="14MB")
    words.save_pretrained(target / "clip")
    CLIPImageProcessor(size={"shortest_edge": plan.side_px}, crop_size=plan.side_px, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(target / "clip")
    (target / "plan.json").write_text(json.dumps(asdict(plan), indent=1) + "\n")
    bases.write_manifest(target)
    StableDiffusionPipeline.from_pretrained(target, dtype=torch.float32)
    CLIPModel.from_pretrained(target / "clip")
    shutil.rmtree(out, ignore_errors=True)
    target.rename(out)
    files = [p for p in out.rglob("*") if p.is_file()]
    print(f"{out}: {sum(p.stat().st_size for p in files) / 1e6:.1f} MB, largest file {max(p.stat().st_size for p in files) / 1e6:.1f} MB", flush=True)


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", nargs="+", choices=["all", "prepare", "vae", "clip", "unet", "decoder", "tower", "export"])
    p.add_argument("--data", type=Path, nargs="+", default=[], help="imagefolders or tars of captioned portraits")
    p.add_argument("--work", type=Path, required=True, help="folder of crops, caches and checkpoints")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where the pipeline is written")
    p.add_argument("--plan", choices=sorted(PLANS), default="gpu" if torch.cuda.is_available() else "cpu")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a number of the plan, e.g. unet_samples=500000")
    p.add_argument("--minutes", type=float, help="stop cleanly after this long, to be resumed")
    p.add_argument("--init", type=Path, help="exported pipeline whose weights a stage begins with; its sizes and its vocabulary must be the plan's")
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    known = asdict(PLANS[a.plan])
    for item in a.set:
        key, _, value = item.partition("=")
        if key not in known or isinstance(known[key], tuple):
            p.error(f"--set {item}: no number of that name; there are {', '.join(k for k, v in known.items() if not isinstance(v, tuple))}")
        known[key] = type(known[key])(value)
    plan = Plan(**known)
    torch.set_flush_denormal(True)           # of this whole process, which is why nobody below does it
    place = Place.here(a.work, a.minutes, a.init)
    a.work.mkdir(parents=True, exist_ok=True)
    for stage in ["prepare", "vae", "clip", "unet", "decoder", "tower", "export"] if a.stage == ["all"] else a.stage:
        if stage == "prepare":
            data.prepare(a.data, a.work / "data", side_px=plan.side_px)
        elif stage == "export":
            export(plan, place, a.out)
        elif not {"vae": train_vae, "clip": train_clip, "unet": train_unet, "decoder": train_decoder, "tower": train_tower}[stage](plan, place):
            break


if __name__ == "__main__":
    main()
