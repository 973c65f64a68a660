"""The training program of the maquette, whole, at toy size: every stage, its resumption, and a pipeline that loads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from models.diffusion import bases
from models.maquette import data, pretrain, tokenizer, train_vae, training
from models.maquette.train_clip import grid_positions, mirror, train_clip, train_tower
from models.maquette.train_unet import cache_latents, train_unet
from models.maquette.train_vae import face_weight, reconstruction_loss, train_decoder, window
from models.maquette.train_vae import train_vae as train_autoencoder
from models.maquette.vocabulary import SLOTS, TRIGGERS

TOY = training.PLANS["toy"]


@pytest.fixture(scope="module")
def portraits(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rendered photos as an imagefolder of four people; the words are made up, the faces are there."""
    folder = tmp_path_factory.mktemp("portraits")
    lines = []
    for n, photo in enumerate(sorted((root / "examples" / "demo").glob("*.jpg"))):
        with Image.open(photo) as picture:
            picture.resize((192, 192)).save(folder / f"{n:02d}.webp")
        values = {slot: sorted(SLOTS[slot].phrases)[n % len(SLOTS[slot].phrases)] for slot in SLOTS}
        lines.append(json.dumps({"file_name": f"{n:02d}.webp", "identity": f"{n // 3:06d}", "hair_changed": False, "second_colour": "none", "hat_colour": "red",
                                 "pattern": "plain", "place_colour": "none", **values}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def place(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> training.Place:
    """A work folder after `prepare`, in fp32: what is compared to the bit must not hang on what this CPU prefers."""
    work = tmp_path_factory.mktemp("work")
    data.prepare([portraits], work / "data", side_px=TOY.side_px, workers=1)
    return dataclasses.replace(training.Place.here(work, None), autocast=contextlib.nullcontext)


def test_prepare_keeps_pictures_with_one_face_and_refuses_reserved_people(portraits: Path, place: training.Place, tmp_path: Path) -> None:
    crops, rows = data.load(place.work / "data")
    assert len(rows) >= 10
    assert crops.shape == (len(rows), 32, 32, 3)
    (tmp_path / "metadata.jsonl").write_text((portraits / "metadata.jsonl").read_text().replace('"000000"', '"900001"'))
    for picture in portraits.glob("*.webp"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    with pytest.raises(ValueError, match="reserved"):
        data.prepare([tmp_path], tmp_path / "out", side_px=32, workers=1)


def small(**numbers: int) -> training.Plan:
    return dataclasses.replace(TOY, **{"vae_samples": 32, "clip_samples": 24, "tower_samples": 24, "unet_samples": 32, "clip_batch": 6, **numbers})


def test_all_stages_end_in_a_pipeline_that_plain_diffusers_loads(place: training.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small()
    assert train_autoencoder(plan, place)
    assert train_clip(plan, place)
    assert train_unet(plan, place)
    assert train_decoder(plan, place)
    assert train_tower(plan, place)
    out = tmp_path / "weights"
    pretrain.export(plan, place, out)
    assert {p.suffix for p in out.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".txt"}
    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32, safety_checker=None)
    image = pipe("a photo of a woman", num_inference_steps=2, output_type="np", height=32, width=32).images[0]
    assert image.shape == (32, 32, 3)
    assert np.isfinite(image).all()
    clip = CLIPModel.from_pretrained(out / "clip")
    for name, tensor in pipe.text_encoder.state_dict().items():      # one text tower: what conditions the UNet is what measures adherence
        assert torch.equal(tensor, clip.text_model.state_dict()[name.removeprefix("text_model.")].float()), name
    monkeypatch.setitem(bases.CATALOGUE, "toy", dataclasses.replace(bases.CATALOGUE["maquette"], resolution_px=32))  # type: ignore[arg-type]
    reference = bases.reference("toy", folder=out)
    assert reference.prediction == "v_prediction"
    assert json.loads((out / "plan.json").read_text())["unet_samples"] == 32


@pytest.mark.parametrize(("stage", "samples"), [("vae", "vae_samples"), ("clip", "clip_samples")])
def test_stopped_and_resumed_is_undisturbed_to_the_bit(place: training.Place, tmp_path: Path, stage: str, samples: str) -> None:
    train = {"vae": train_autoencoder, "clip": train_clip}[stage]
    weights = []
    for times_stopped in (0, 1, 2):
        work = tmp_path / str(times_stopped)
        work.mkdir()
        (work / "data").symlink_to(place.work / "data")
        here = dataclasses.replace(place, work=work)
        for _ in range(times_stopped):
            assert not train(small(), dataclasses.replace(here, minutes=0.0))      # time is up after one step
        assert train(small(), here)
        weights.append(load_file(work / f"{stage}.safetensors"))
    for other in weights[1:]:
        assert weights[0].keys() == other.keys()
        assert all(torch.equal(weights[0][k], other[k]) for k in other)


def test_the_tokenizer_is_the_same_in_every_process_and_every_trigger_is_one_token(root: Path, tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from models.maquette import tokenizer; tokenizer.build(Path(sys.argv[1]))"
    built = []
    for name in "ab":
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], cwd=root, check=True)
        built.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert built[0] == built[1]
    words = tokenizer.build(tmp_path / "a")
    assert all(len(words(t, add_special_tokens=False).input_ids) == 1 for t in TRIGGERS)


def test_the_decoder_is_trained_alone_so_that_latents_stay_as_the_unet_knows_them(place: training.Place) -> None:
    assert train_autoencoder(small(), place)
    cache_latents(small(), place)
    assert train_decoder(small(), place)
    before, after = (load_file(place.work / f"{name}.safetensors") for name in ("vae", "decoder"))
    for name in (k for k in before if k.startswith("model.")):
        moved = not torch.equal(before[name], after[name])
        assert moved == name.startswith(("model.decoder", "model.post_quant_conv")), name


def test_windows_lie_on_the_grid_and_faces_weigh_most() -> None:
    plan = training.Plan()
    for seed in range(50):
        for part in window(plan, np.random.default_rng(seed), grid=8):
            assert part.start % 8 == 0
            assert part.stop - part.start == 64
            assert 0 <= part.start <= 64
    weight = face_weight(128)
    assert float(weight.mean()) == pytest.approx(1.0)
    assert weight[64, 64] > 5 * weight[3, 3]
    real = torch.zeros(1, 3, 128, 128)
    face, margin = real.clone(), real.clone()
    face[..., 56:72, 56:72] = 0.5
    margin[..., :16, :16] = 0.5
    assert reconstruction_loss(face, real, weight) > 4 * reconstruction_loss(margin, real, weight)


def test_the_tower_leaves_text_as_the_unet_knows_it_and_moves_the_pictures(place: training.Place) -> None:
    assert train_clip(small(), place)
    assert train_tower(small(), place)
    before, after = (load_file(place.work / f"{name}.safetensors") for name in ("clip", "tower"))
    for name in (k for k in before if k.startswith("model.")):
        same = torch.equal(before[name], after[name])
        assert same or not name.startswith("model.text_model"), name
        assert not same or not name.endswith(("visual_projection.weight", "text_projection.weight", "vision_model.embeddings.class_embedding")), name


def test_a_mirror_image_swaps_sides_and_nothing_else() -> None:
    assert mirror({"view": "in profile facing left", "hat": "none"}) == {"view": "in profile facing right", "hat": "none"}
    assert mirror({"view": "looking to the right"})["view"] == "looking to the left"
    assert mirror({"view": "frontal"})["view"] == "frontal"


def test_windows_are_cut_where_the_weights_are_cut_and_the_last_steps_see_whole_crops(place: training.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []
    real_fit = train_vae.fit

    def watch(trained: training.Trained, *arguments: object, loss_of: object, **named: object) -> bool:
        encode = trained.model.encode
        monkeypatch.setattr(trained.model, "encode", lambda x: (sides.append(x.shape[-1]), encode(x))[1], raising=False)
        return real_fit(trained, *arguments, loss_of=loss_of, **(named | {"sheet": None}))  # type: ignore[arg-type]

    monkeypatch.setattr(train_vae, "fit", watch)
    work = place.work / "windows"
    work.mkdir()
    (work / "data").symlink_to(place.work / "data")
    train_autoencoder(small(vae_samples=80), dataclasses.replace(place, work=work))
    assert sides == [16] * 9 + [32]


def test_grid_positions_tell_every_patch_apart_and_neighbours_are_most_alike() -> None:
    at = grid_positions(8, 256)
    assert at.shape == (64, 256)
    distance = torch.cdist(at, at)
    assert (distance + 9 * torch.eye(64)).min() > 0.5
    assert distance[27, 28] < distance[27, 31]
    assert distance[27, 35] < distance[27, 59]
