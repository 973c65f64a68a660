"""Bases of both families, at the smallest size that has all their parts: read as diffusers' own pipelines read them, trained by every method."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load

from likeness.errors import UnknownBase
from likeness.recipe import METHODS, DreamBooth, Lora, Objective, Pivotal, Recipe, TextualInversion
from models.diffusion import bases, checkpoint
from models.diffusion.batches import Batches, TrainingInputs, encode
from models.diffusion.exports import embedding_file, lora_file, write_pipeline
from models.diffusion.families import FAMILIES, Texts
from models.diffusion.loop import Checkpoint, Job, fit
from models.diffusion.methods import adapted, as_file, plan_of, step_of
from models.diffusion.sampler import sample
from tests.models.diffusion import tiny

KINDS: list[tuple[tiny.Family, str]] = [(family, prediction) for family in get_args(tiny.Family) for prediction in ("epsilon", "v_prediction")]
LORA = Lora(steps=4, batch=2, rank=2, alpha=1.0, checkpoint_every=2, targets=("attention", "convolution", "text_encoder"))
RECIPES: dict[str, Recipe] = {
    "lora": LORA.model_copy(update={"targets": ("attention",)}), "lora with text": LORA,
    "dreambooth": DreamBooth(steps=4, batch=2, checkpoint_every=2), "dreambooth with text": DreamBooth(steps=4, batch=2, checkpoint_every=2, text_encoder=True),
    "textual inversion": TextualInversion(steps=4, batch=2, vectors=2, checkpoint_every=2, learning_rate=0.1),
    "pivotal": Pivotal(steps=4, batch=2, rank=2, vectors=2, checkpoint_every=2, inversion_share=0.25),
    "lora with dop": LORA.model_copy(update={"objective": Objective(prior="dop", prior_weight=1.0), "targets": ("attention",)}),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@dataclass
class World:
    """One base, what is trained on it, and its weights before anybody did."""

    base: bases.Base
    folder: Path
    inputs: TrainingInputs
    weights: dict[str, torch.Tensor]

    def is_itself(self) -> bool:
        after = weights_of(self.base)
        return (after.keys() == self.weights.keys() and all(torch.equal(after[k], self.weights[k]) for k in after) and not self.base.spelling
                and all(len(getattr(self.base.pipe, f"tokenizer{end}")) == self.base.towers[f"text_encoder{end}"].get_input_embeddings().num_embeddings
                        for end in self.base.family.ends)
                and not any(p.requires_grad or p.grad is not None for m in (self.base.unet, *self.base.towers.values()) for p in m.parameters()))

    def job(self, recipe: Recipe, **more: Any) -> Job:
        return Job("ada", lambda: step_of(self.base, self.inputs, recipe), plan_of(recipe), **more)

    def foreign(self) -> Any:
        """The pipeline as another program loads it."""
        pipe = FAMILIES[self.base.ref.family].pipeline.from_pretrained(str(self.folder), dtype=torch.float32, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def weights_of(base: bases.Base) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part in ("unet", "vae", *base.towers) for k, v in getattr(base.pipe, part).state_dict().items()}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], World]]:
    torch.set_num_threads(1)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for family, prediction in KINDS:
            patch.setitem(bases.CATALOGUE, f"tiny-{family}", tiny.entry(family))  # type: ignore[arg-type]
            made[family, prediction] = new_world(tiny.build(tmp_path_factory.mktemp("base"), family, prediction=prediction), family)
        yield made


def new_world(folder: Path, family: tiny.Family) -> World:
    base = bases.load(f"tiny-{family}", folder=folder, device="cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (5, tiny.SIDE_PX, tiny.SIDE_PX, 3), np.uint8)
    inputs = encode(base, crops_NSSC=pictures[:3], masks_NSS=np.full((3, tiny.SIDE_PX, tiny.SIDE_PX), 255, np.uint8),
                    captions=["sks man", "a sks man", "sks man, old"], class_images_MSSC=pictures[3:], class_captions=["man", "a man"], noun="man",
                    originals_px=[8.0, 16.0, 40.0])
    return World(base, folder, inputs, weights_of(base))


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join(kind))
def world(request: pytest.FixtureRequest, worlds: dict[tuple[str, str], World]) -> World:
    return worlds[request.param]


@pytest.fixture
def xl(worlds: dict[tuple[str, str], World]) -> World:
    return worlds["sdxl", "epsilon"]


@every_recipe
def test_a_training_changes_the_pictures_resumes_to_the_bit_and_leaves_the_base(world: World, recipe: Recipe) -> None:
    base = world.base
    before = sample(base, ["a photo of sks man"], [1], steps=2)
    kept: list[Checkpoint] = []
    [whole] = fit([world.job(recipe, on_checkpoint=kept.append)])
    assert whole.error is None, whole.error
    [resumed] = fit([world.job(recipe, resume=checkpoint.read(checkpoint.write(kept[0], training="k"), training="k"))])
    assert resumed.losses == whole.losses
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[k], whole.tensors[k]) for k in whole.tensors)
    file = checkpoint.write_adapter(as_file(whole.tensors), {"method": recipe.method})
    pictures = []
    for _ in range(2):
        with adapted(base, checkpoint.read_adapter(file)[0], recipe):
            pictures.append(sample(base, ["a photo of sks man"], [1], steps=2))
        assert world.is_itself()
    assert np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0].astype(int) - before).max() > 0
    assert np.array_equal(sample(base, ["a photo of sks man"], [1], steps=2), before)


@pytest.mark.parametrize("family", get_args(tiny.Family))
@every_recipe
def test_only_what_is_trained_has_a_gradient(worlds: dict[tuple[str, str], World], family: tiny.Family, recipe: Recipe) -> None:
    world = worlds[family, "epsilon"]
    step = step_of(world.base, world.inputs, recipe)
    try:
        trained = {id(p) for group in step.groups() for p in group.parameters}
        step.loss(3).backward()
        modules = (world.base.unet, world.base.pipe.vae, *world.base.towers.values())
        moved = {id(p) for m in modules for p in m.parameters() if p.grad is not None} | {id(p) for g in step.groups() for p in g.parameters if p.grad is not None}
        assert moved <= trained
        # the last layer of an SDXL tower is read by nobody, except the pooled vector of the second
        unread = {id(p) for tower in list(world.base.towers.values())[:1] for n, p in tower.named_parameters() if "layers.1." in n or "final_layer_norm" in n}
        assert trained - moved == (trained & unread if world.base.ref.family == "sdxl" else set())
    finally:
        step.close()
    assert world.is_itself()


@pytest.mark.parametrize(("name", "kinds"), [
    ("lora", {"unet"}), ("lora with text", {"unet", "text_encoder", "text_encoder_2"}), ("dreambooth", {"delta.unet"}),
    ("dreambooth with text", {"delta.unet", "delta.text_encoder", "delta.text_encoder_2"}), ("textual inversion", {"vectors.sks", "vectors_2.sks"}),
    ("pivotal", {"unet", "vectors.sks", "vectors_2.sks"}),
])
def test_an_adapter_of_two_towers_names_both(xl: World, name: str, kinds: set[str]) -> None:
    [result] = fit([xl.job(RECIPES[name].model_copy(update={"steps": 1}))])
    found = {re.match(r"(delta\.)?\w+(\.sks)?", k)[0] for k in result.tensors}  # type: ignore[index]
    assert found == kinds
    if "vectors" in name or name == "textual inversion":
        assert [v.shape for _, v in sorted(result.tensors.items())] == [(2, 24), (2, 40)]


def test_texts_are_read_as_the_pipeline_reads_them(world: World) -> None:
    texts = ["a photo of sks man", "x" * 99, "woman, old"]
    made = world.base.encode_texts(texts)
    theirs = world.foreign().encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    nothing = world.base.encode_texts([""])
    assert torch.equal(made.states_BTD, theirs[0])
    assert torch.equal(nothing.states_BTD, theirs[1][:1])           # for SDXL: zeros
    if world.base.ref.family == "sdxl":
        assert torch.equal(made.pooled_BE, theirs[2])  # type: ignore[arg-type]
        assert torch.equal(nothing.pooled_BE, theirs[3][:1])  # type: ignore[arg-type]
        assert not nothing.states_BTD.any()
    else:
        assert made.pooled_BE is None


def test_the_network_is_told_what_the_pipeline_tells_it(world: World) -> None:
    told: list[torch.Tensor] = []
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    hook = world.base.unet.register_forward_hook(lambda module, args, out: told.append(out[0] if isinstance(out, tuple) else out.sample))
    try:
        world.base.pipe(["sks man"], latents=noise.clone(), num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        with torch.no_grad():
            world.base.denoise(noise, world.base.pipe.scheduler.timesteps, world.base.encode_texts(["sks man"]))
    finally:
        hook.remove()
    assert torch.equal(told[0], told[1])


def test_only_sdxl_is_told_how_large_a_picture_was(world: World) -> None:
    x, t, texts = torch.randn(1, 4, 8, 8), torch.tensor([500]), world.base.encode_texts(["sks man"])
    with torch.no_grad():
        usual, as_large, smaller = (world.base.denoise(x, t, texts, original_px_B=side) for side in (None, torch.tensor([16.0]), torch.tensor([7.0])))
    assert torch.equal(usual, as_large)
    assert torch.equal(usual, smaller) is (world.base.ref.family == "sd15")


def test_a_batch_knows_how_large_its_portraits_were(xl: World) -> None:
    for objective, second in ((Objective(), [16.0]), (Objective(prior="dop"), None)):
        batches = Batches(xl.base, xl.inputs, objective, batch=2, seed=0)
        for step in range(3):
            sides, order = batches.draw(step).original_px_B.tolist(), batches._portraits(step)
            assert sides[:2] == [[8.0, 16.0, 40.0][i] for i in order]
            assert sides[2:] == (second or sides[:1])


def test_a_text_with_a_new_word_is_pooled_at_its_end(xl: World) -> None:
    tower = xl.base.towers["text_encoder_2"]
    assert tower.config.eos_token_id == 2
    [result] = fit([xl.job(RECIPES["textual inversion"])])
    with adapted(xl.base, result.tensors, RECIPES["textual inversion"]):
        ids = xl.base.token_ids(["sks man"])
        end = ids[0, 1].tolist().index(xl.base.pipe.tokenizer_2.eos_token_id)
        assert ids[0, 1].argmax() != end                # the trap: the vectors' tokens have higher numbers than the end of the text
        with torch.no_grad():
            states = tower.text_model(ids[:, 1]).last_hidden_state[0, end]
            assert torch.allclose(xl.base.read_texts(ids).pooled_BE[0], tower.text_projection(states), atol=1e-6)  # type: ignore[index]


def test_an_empty_text_is_zeros_beside_others_and_has_no_gradient(xl: World) -> None:
    read = xl.base.encode_texts(["", "man"])
    assert (read.states_BTD[1].any(), read.states_BTD[0].any(), read.pooled_BE[0].any()) == (True, False, False)  # type: ignore[index]
    assert torch.equal(Texts.cat([read[:1], read[1:]]).states_BTD, read.states_BTD)


# -- what other programs read

def latents(pipe: Any, prompt: str) -> torch.Tensor:
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    return pipe([prompt], latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="latent").images


def changed(world: World, recipe: Recipe) -> dict[str, torch.Tensor]:
    step = step_of(world.base, world.inputs, recipe)
    tensors = step.export()
    step.close()
    g = torch.Generator().manual_seed(0)
    return as_file({k: v + (0.01 if k.startswith("delta.") else 0.3) * torch.randn(v.shape, generator=g) for k, v in tensors.items()})


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_file_of_sdxl_draws_the_same_in_a_plain_pipeline(xl_in_twos: World, tmp_path: Path, form: str) -> None:
    world = xl_in_twos
    tensors, foreign = changed(world, LORA), world.foreign()
    with adapted(world.base, tensors, LORA):
        wanted = latents(world.base.pipe, "sks man")
    assert (latents(foreign, "sks man") - wanted).abs().max() > 0.1
    (tmp_path / "ada.safetensors").write_bytes(lora_file(tensors, LORA, form, family=world.base.ref.family))
    foreign.load_lora_weights(str(tmp_path), weight_name="ada.safetensors")
    assert torch.allclose(latents(foreign, "sks man"), wanted, atol=2e-3)


@pytest.fixture(scope="module")
def xl_in_twos(worlds: dict[tuple[str, str], World], tmp_path_factory: pytest.TempPathFactory) -> World:
    """With two layers in a block, as the real one has, by which kohya's scripts number them."""
    return new_world(tiny.build(tmp_path_factory.mktemp("base"), "sdxl", prediction="epsilon", layers=2), "sdxl")


def test_kohyas_names_of_sdxl_are_kohyas(xl_in_twos: World) -> None:
    names = load(lora_file(changed(xl_in_twos, LORA), LORA, "kohya", family="sdxl"))
    assert {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight", "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
            "lora_unet_output_blocks_2_1_proj_in.alpha", "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight", "lora_unet_middle_block_2_out_layers_3.alpha",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha", "lora_te2_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight"} <= names.keys()
    assert not any("down_blocks" in name or "up_blocks" in name or "mid_block" in name for name in names)


def test_the_vectors_of_both_towers_are_one_word_in_a_plain_pipeline(xl: World) -> None:
    recipe = RECIPES["textual inversion"]
    tensors, foreign = changed(xl, recipe), xl.foreign()
    with adapted(xl.base, tensors, recipe):
        wanted = latents(xl.base.pipe, xl.base.spell("a sks man"))
    file = load(embedding_file(tensors, recipe, token="<ada>"))
    assert file.keys() == {"clip_l", "clip_g"}
    foreign.load_textual_inversion(file["clip_l"], token="<ada>", text_encoder=foreign.text_encoder, tokenizer=foreign.tokenizer)
    foreign.load_textual_inversion(file["clip_g"], token="<ada>", text_encoder=foreign.text_encoder_2, tokenizer=foreign.tokenizer_2)
    bases.find_end_of_text(foreign.text_encoder_2, foreign.tokenizer_2)
    assert torch.allclose(latents(foreign, "a <ada> man"), wanted, atol=1e-4)
    assert (latents(foreign, "a sks man") - wanted).abs().max() > 0.01


def test_a_dreambooth_adapter_of_sdxl_becomes_a_whole_pipeline(xl: World, tmp_path: Path) -> None:
    recipe = DreamBooth(text_encoder=True)
    tensors = changed(xl, recipe)
    with adapted(xl.base, tensors, recipe):
        wanted = latents(xl.base.pipe, "sks man")
    write_pipeline(xl.base, tensors, recipe, tmp_path / "ada")
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "ada"), local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(pipe, "sks man"), wanted, atol=1e-5)
    assert (latents(xl.base.pipe, "sks man") - wanted).abs().max() > 0.01


# -- the catalogue, and folders that are not what they are called

def test_every_line_of_the_catalogue_says_where_its_weights_are() -> None:
    for name, entry in bases.CATALOGUE.items():
        assert entry.licence
        if entry.folder is None and not name.startswith("tiny-"):
            assert entry.hub is not None
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub[0])
            assert re.fullmatch(r"[0-9a-f]{40}", entry.hub[1])
    assert {"maquette", "sd15", "sdxl"} <= bases.CATALOGUE.keys()
    assert set(METHODS) == {r.method for r in RECIPES.values()}


@pytest.mark.parametrize(("file", "change", "words"), [
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionXLPipeline, its folder holds a StableDiffusionPipeline"),
    ("unet/config.json", {"sample_size": 16}, "draws 16 px, its folder holds one of 32 px"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'"),
    ("vae/config.json", None, "vae/config.json is missing or is not JSON"),
])
def test_a_folder_that_is_not_what_it_is_called_is_refused(xl: World, tmp_path: Path, file: str, change: dict[str, Any] | None, words: str) -> None:
    shutil.copytree(xl.folder, tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_text("broken" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnknownBase, match=words):
        bases.reference("tiny-sdxl", folder=tmp_path / "base")


def test_a_scheduler_that_says_nothing_predicts_what_the_catalogue_says(xl: World, tmp_path: Path) -> None:
    shutil.copytree(xl.folder, tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "prediction_type"}))
    assert bases.reference("tiny-sdxl", folder=tmp_path / "base").prediction == "epsilon"
    assert isinstance(xl.base.pipe, StableDiffusionXLPipeline)
    assert not issubclass(StableDiffusionXLPipeline, StableDiffusionPipeline)
