"""Files of other programs: what we export comes back and draws the same, what others write is put in as they mean it, what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load, save
from torch import Tensor

from likeness.errors import InputError, RecipeError
from likeness.recipe import Lora, Pivotal, Recipe, TextualInversion
from models.diffusion import bases
from models.diffusion.exports import embedding_file, lora_file
from models.diffusion.imports import carrying, read_foreign
from models.diffusion.lora import Factors
from models.diffusion.methods import adapted, as_file
from tests.models.diffusion import tiny

LORA = Lora(rank=2, alpha=1.0, targets=("attention", "convolution", "text_encoder"))
both = pytest.mark.parametrize("family", get_args(tiny.Family))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bases.Base]]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        made = {}
        for family in get_args(tiny.Family):
            patch.setitem(bases.CATALOGUE, f"tiny-{family}", tiny.entry(family))  # type: ignore[arg-type]
            folder = tiny.build(tmp_path_factory.mktemp("base"), family, prediction="epsilon", layers=2)
            made[family] = bases.load(f"tiny-{family}", folder=folder, device="cpu")
        yield made


@pytest.fixture
def sd(every: dict[str, bases.Base]) -> bases.Base:
    return every["sd15"]


def latents(base: bases.Base, prompt: str) -> Tensor:
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    made: Tensor = base.pipe([base.spell(prompt)], latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="latent").images
    return made


def by_chance(base: bases.Base, recipe: Recipe) -> dict[str, Tensor]:
    """An adapter of this recipe, as its file has it."""
    g, tensors = torch.Generator().manual_seed(0), {}
    if isinstance(recipe, Lora | Pivotal):
        factors = Factors(base, recipe, seed=0)
        tensors = factors.state()
        factors.close()
    if isinstance(recipe, TextualInversion | Pivotal):
        tensors |= {f"vectors{end}.sks": torch.zeros(recipe.vectors, tower.config.hidden_size) for end, tower in zip(base.family.ends, base.towers.values(), strict=True)}
    return as_file({k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in tensors.items()})


def drawn(base: bases.Base, prompt: str, *files: Path) -> Tensor:
    before = latents(base, prompt)
    with carrying(base, *(read_foreign(file, base) for file in files)):
        made = latents(base, prompt)
    assert torch.equal(latents(base, prompt), before)
    assert not base.spelling
    assert (made - before).abs().max() > 0.01
    return made


@both
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_file_comes_back_and_draws_the_same(every: dict[str, bases.Base], tmp_path: Path, family: tiny.Family, form: str) -> None:
    base = every[family]
    tensors = by_chance(base, LORA)
    with adapted(base, tensors, LORA):
        wanted = latents(base, "sks man")
    (tmp_path / "ada.safetensors").write_bytes(lora_file(tensors, LORA, form, family=family))
    assert torch.allclose(drawn(base, "sks man", tmp_path / "ada.safetensors"), wanted, atol=2e-3 if form == "diffusers" else 1e-4)      # diffusers' B is rounded again


@both
def test_an_embedding_comes_back_alone_and_beside_its_lora_file(every: dict[str, bases.Base], tmp_path: Path, family: tiny.Family) -> None:
    base, recipe = every[family], Pivotal(rank=2, alpha=2.0, targets=("attention",), vectors=3)
    tensors = by_chance(base, recipe)
    word, lora = tmp_path / "word.safetensors", tmp_path / "lora.safetensors"
    word.write_bytes(embedding_file(tensors, recipe, token="<ada>"))
    lora.write_bytes(lora_file(tensors, recipe, "kohya", family=family))
    with adapted(base, tensors, recipe):
        wanted = latents(base, "a photo of sks man")
    assert torch.allclose(drawn(base, "a photo of sks man", lora, word), wanted, atol=1e-4)
    alone = TextualInversion(vectors=3)
    with adapted(base, {k: v for k, v in tensors.items() if k.startswith("vectors")}, alone):
        wanted = latents(base, "a photo of sks man")
    assert torch.equal(drawn(base, "a photo of sks man", word), wanted)
    with pytest.raises(RecipeError, match="one LoRA file and one embedding"), carrying(base, *[read_foreign(word, base)] * 2):
        pass


def test_an_embedding_of_automatic1111_and_one_of_a_single_vector_are_words(sd: bases.Base, tmp_path: Path) -> None:
    vectors = 0.3 * torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    for name, tensors in {"ours": {"<ada>": vectors}, "theirs": {"emb_params": vectors.half()}, "flat": {"<ada>": vectors[0]}}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(save(tensors))
    ours = drawn(sd, "sks man", tmp_path / "ours.safetensors")
    assert torch.allclose(drawn(sd, "sks man", tmp_path / "theirs.safetensors"), ours, atol=1e-2)
    assert read_foreign(tmp_path / "flat.safetensors", sd).vectors[0].shape == (1, 24)


ATTENTION, FF, CONV = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "down_blocks.0.resnets.0.conv1"


def test_every_layer_keeps_its_own_rank_and_alpha(sd: bases.Base, tmp_path: Path) -> None:
    """Beside W + alpha / rank * B A, written into a copy of the network."""
    g, file, merged = torch.Generator().manual_seed(0), {}, copy.deepcopy(sd.unet)
    fc1 = "text_model_encoder_layers_0_mlp_fc1"
    for layer, rank, alpha in ((ATTENTION, 1, 2.0), (FF, 3, None), (CONV, 5, 4.0)):
        module = merged.get_submodule(layer)
        down, up = (0.3 * torch.randn(shape, generator=g) for shape in ((rank, *module.weight.shape[1:]), (len(module.weight), rank, *(1,) * (module.weight.dim() - 2))))
        name = f"lora_unet_{layer.replace('.', '_')}"
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up} | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})
        module.weight.data += (alpha or rank) / rank * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    (tmp_path / "mixed.safetensors").write_bytes(save(file))
    own = sd.pipe.unet
    sd.pipe.unet = merged
    wanted = latents(sd, "sks man")
    sd.pipe.unet = own
    assert torch.allclose(drawn(sd, "sks man", tmp_path / "mixed.safetensors"), wanted, atol=1e-4)
    file |= {f"lora_te_{fc1}.lora_down.weight": torch.randn(2, 24, generator=g), f"lora_te_{fc1}.lora_up.weight": torch.ones(48, 2)}       # a layer that no recipe of ours trains
    (tmp_path / "more.safetensors").write_bytes(save(file))
    held = read_foreign(tmp_path / "more.safetensors", sd)
    assert held.what == "a LoRA file, 4 layers, rank 1 to 5"
    assert (drawn(sd, "sks man", tmp_path / "more.safetensors") - wanted).abs().max() > 0.01


@pytest.mark.parametrize("pattern", [{}, {"attn2.to_k": 1}])
def test_a_file_that_diffusers_writes_is_read_with_the_alpha_that_it_notes(sd: bases.Base, tmp_path: Path, pattern: dict[str, int]) -> None:
    foreign = copy.deepcopy(sd.unet)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_out.0"], init_lora_weights=False, alpha_pattern=pattern)
    foreign.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=get_peft_model_state_dict(foreign), unet_lora_adapter_metadata=config.to_dict(),
                                              weight_name="theirs.safetensors")
    own = sd.pipe.unet
    sd.pipe.unet = foreign
    wanted = latents(sd, "sks man")
    sd.pipe.unet = own
    assert torch.allclose(drawn(sd, "sks man", tmp_path / "theirs.safetensors"), wanted, atol=1e-4)


def test_the_names_of_older_diffusers_are_the_same_layers(sd: bases.Base, tmp_path: Path) -> None:
    recipe = Lora(rank=2, alpha=2.0, targets=("attention",))
    now = load(lora_file(by_chance(sd, recipe), recipe, "diffusers", family="sd15"))

    def then(key: str) -> str:
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        for end in ("q", "k", "v", "out"):
            key = key.replace(f".to_{end}.lora.", f".processor.to_{end}_lora.").replace(f".to_{end}.0.lora.", f".processor.to_{end}_lora.")
        return key

    old = {then(key): v for key, v in now.items()}
    assert sum("processor" in key for key in old) == sum(".attn" in key for key in old) > 0
    (tmp_path / "now.safetensors").write_bytes(save(now))
    (tmp_path / "old.safetensors").write_bytes(save(old))
    assert torch.equal(drawn(sd, "sks man", tmp_path / "old.safetensors"), drawn(sd, "sks man", tmp_path / "now.safetensors"))


A, B = f"unet.{ATTENTION}.lora_A.weight", f"unet.{ATTENTION}.lora_B.weight"
ALPHA = f"unet.{ATTENTION}.alpha"
GOOD = {A: torch.ones(2, 24), B: torch.ones(32, 2)}


def _header(length: int) -> bytes:
    return length.to_bytes(8, "little") + b"{}" + b" " * 100


@pytest.mark.parametrize(("data", "kind", "words"), [
    (lambda: save(GOOD)[:-8], InputError, "not a whole safetensors file: get it again"),
    (lambda: save(GOOD)[:5], InputError, "not a whole safetensors file"),
    (lambda: _header(2**40), InputError, "header is longer than the file"),
    (lambda: (2).to_bytes(8, "little") + b"{}", InputError, "holds no tensors"),
    (lambda: (4).to_bytes(8, "little") + b"[{}]", InputError, "not a whole safetensors file"),
    (lambda: (10**5).to_bytes(8, "little") + b"[" * 10**5, InputError, "not a whole safetensors file"),
    (lambda: (0x80).to_bytes(8, "little") + b"{" * 200, InputError, "not a whole safetensors file"),
    (lambda: pickle.dumps(GOOD), InputError, "is pickled: such files run code"),
    (lambda: b"PK\x03\x04" + bytes(99), InputError, "is pickled"),
    (lambda: save(GOOD | {A: torch.full((2, 24), float("nan"))}), InputError, "lora_A.weight holds values that are no numbers"),
    (lambda: save(GOOD | {A: torch.ones(2, 24, dtype=torch.int64)}), InputError, "holds values that are no numbers"),
    (lambda: save(GOOD | {ALPHA: torch.tensor(float("inf"))}), InputError, "attn2.to_k.alpha holds values that are no numbers"),
    (lambda: save(GOOD | {ALPHA: torch.tensor(True)}), InputError, "attn2.to_k.alpha holds values that are no numbers"),
    (lambda: save(GOOD | {ALPHA: torch.ones(2)}), RecipeError, f"alpha of layer unet.{ATTENTION} has 2 values, and one is needed"),
    (lambda: save({A: torch.tensor(1.0), B: GOOD[B]}), RecipeError, f"A of layer unet.{ATTENTION} has no rank"),
    (lambda: save({A: torch.ones(0, 24), B: torch.ones(32, 0)}), RecipeError, f"A of layer unet.{ATTENTION} has no rank"),
    (lambda: save({A: GOOD[A], B: torch.tensor(1.0)}), RecipeError, f"B of layer unet.{ATTENTION} has shape none, base 'tiny-sd15' wants 32x2"),
    (lambda: save({"x": torch.tensor(1.0)}), RecipeError, "x has 0 axes, vectors of a word have 1 or 2"),
    (lambda: save({"clip_l": torch.tensor(1.0), "clip_g": torch.tensor(1.0)}), RecipeError, "clip_g has 0 axes"),
    (lambda: save({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 1, 24)}), RecipeError, "clip_g has 3 axes"),
    (lambda: save({"clip_l": torch.ones(1, 24), "emb_params": torch.ones(1, 24)}), RecipeError, "holds clip_l and emb_params: an embedding has one tensor, or clip_l and clip_g"),
    (lambda: save({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 24), "emb_params": torch.ones(1, 24)}), RecipeError, "holds clip_g and clip_l and emb_params"),
    (lambda: save({A: GOOD[A]}), RecipeError, f"has only A of layer unet.{ATTENTION}: both factors"),
    (lambda: save(GOOD | {"unet.elsewhere.lora_A.weight": torch.ones(2, 2)}), RecipeError, "unet.elsewhere.lora_A.weight, and base 'tiny-sd15' has no such layer"),
    (lambda: save(GOOD | {"something": torch.ones(2, 2)}), RecipeError, "has something, and base"),
    (lambda: save(GOOD | {f"lora_unet_{ATTENTION.replace('.', '_')}.lora_down.weight": torch.ones(2, 24)}), RecipeError, "names layer .* twice"),
    (lambda: save({A: torch.ones(2, 2048), B: torch.ones(32, 2)}), RecipeError, f"A of layer unet.{ATTENTION} has shape 2x2048, base 'tiny-sd15' wants 2x24; the file seems to be for SDXL"),
    (lambda: save({A: torch.ones(2, 768), B: torch.ones(32, 2)}), RecipeError, "seems to be for Stable Diffusion 1.x"),
    (lambda: save({A: torch.ones(2, 24), B: torch.ones(32, 3)}), RecipeError, "B of layer .* has shape 32x3, base 'tiny-sd15' wants 32x2"),
    (lambda: save({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8)}), RecipeError, r"a transformer \(Flux"),
    (lambda: save({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}), RecipeError, "seems to be for SDXL"),
    (lambda: save(GOOD | {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}), RecipeError, "holds LoHa"),
    (lambda: save(GOOD | {"lora_unet_x.dora_scale": torch.ones(2, 2)}), RecipeError, "holds DoRA"),
    (lambda: save(GOOD, {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})}), RecipeError, "use_rslora"),
    (lambda: save(GOOD | {"lora_unet_x.diff": torch.ones(2, 2)}), RecipeError, "holds weights beside factors"),
    (lambda: save(GOOD | {"lora_unet_x.diff_b": torch.ones(2)}), RecipeError, "holds weights beside factors"),
    (lambda: save({"model.diffusion_model.out.2.bias": torch.ones(4), "cond_stage_model.position_ids": torch.arange(20)}), RecipeError, "is a whole base, not something"),
    (lambda: save({"first_stage_model.decoder.conv_in.bias": torch.ones(4)}), RecipeError, "is a whole base"),
    (lambda: save(GOOD, {"lora_adapter_metadata": "["}), RecipeError, "notes of diffusers that cannot be read"),
    (lambda: save(GOOD, {"lora_adapter_metadata": "[" * 10**5}), RecipeError, "notes of diffusers that cannot be read"),
    *((lambda noted=noted: save(GOOD, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in noted.items()})}), RecipeError, words) for noted, words in (
        ({"lora_alpha": "x"}, f"cannot be read: save it again .* \\(alpha of layer unet.{ATTENTION} is no number"), ({"lora_alpha": [1]}, "is no number"),
        ({"lora_alpha": []}, "is no number"), ({"lora_alpha": 10**400}, "is no number"), ({"lora_alpha": float("nan")}, "is no number"),
        ({"alpha_pattern": [1]}, r"cannot be read.* \(alpha_pattern of unet names no layers"), ({"alpha_pattern": {"attn2.to_k": None}}, "is no number"))),
    (lambda: save({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}), RecipeError, "width 768 and 1280, base 'tiny-sd15' has words of width 24; the file seems to be for SDXL"),
    (lambda: save({"<ada>": torch.ones(2, 768)}), RecipeError, "seems to be for Stable Diffusion 1.x"),
    (lambda: save({"<ada>": torch.ones(65, 24)}), RecipeError, "65 vectors: 1 to 64"),
])
def test_what_is_damaged_or_does_not_fit_is_refused_by_name(sd: bases.Base, tmp_path: Path, data: Callable[[], bytes], kind: type[Exception], words: str) -> None:
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(data())
    with pytest.raises(kind, match=words):
        read_foreign(file, sd)


@pytest.mark.parametrize("wanted", [0x80, 0x180, int.from_bytes(b"PK", "little")])
def test_a_header_whose_length_begins_as_a_pickle_does_is_none(sd: bases.Base, tmp_path: Path, wanted: int) -> None:
    """A safetensors file begins with that length, and it is no less one."""
    header = json.dumps({"<ada>": {"dtype": "F32", "shape": [1, 24], "data_offsets": [0, 96]}}).encode().ljust(wanted)
    (tmp_path / "word.safetensors").write_bytes(wanted.to_bytes(8, "little") + header + bytes(96))
    assert read_foreign(tmp_path / "word.safetensors", sd).vectors[0].shape == (1, 24)


def test_an_embedding_is_read_however_long_its_token_is(sd: bases.Base, tmp_path: Path) -> None:
    tensors = {"vectors.sks": torch.zeros(1, 24)}
    for letters in range(57, 66):
        (tmp_path / "word.safetensors").write_bytes(embedding_file(tensors, TextualInversion(), token="a" * letters))
        assert read_foreign(tmp_path / "word.safetensors", sd).vectors[0].shape == (1, 24)


@pytest.mark.parametrize("alpha", [torch.tensor(1), torch.tensor([1], dtype=torch.int32), torch.tensor(1, dtype=torch.uint8)])
def test_an_alpha_without_fractions_is_one(sd: bases.Base, tmp_path: Path, alpha: Tensor) -> None:
    (tmp_path / "theirs.safetensors").write_bytes(save(GOOD | {ALPHA: alpha}))
    factors = read_foreign(tmp_path / "theirs.safetensors", sd).factors
    assert torch.equal(factors[A], GOOD[A])
    assert torch.equal(factors[B], GOOD[B] / 2)


@pytest.mark.parametrize(("noted", "scale"), [({}, 1.0), ({"unet.lora_alpha": None, "unet.alpha_pattern": None}, 1.0), ({"unet.lora_alpha": 4}, 2.0), ({"unet.lora_alpha": 0}, 0.0),
                                              ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_k": 1}}, 0.5)])
def test_a_noted_alpha_is_meant_as_it_is_noted(sd: bases.Base, tmp_path: Path, noted: dict[str, Any], scale: float) -> None:
    (tmp_path / "theirs.safetensors").write_bytes(save(GOOD, {"lora_adapter_metadata": json.dumps(noted)}))
    assert torch.equal(read_foreign(tmp_path / "theirs.safetensors", sd).factors[B], GOOD[B] * scale)


UPSAMPLER = "up_blocks.0.upsamplers.0.conv"
CONVOLUTIONS = {              # of the tiny SDXL, as the original network calls them
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.1.conv2": "input_blocks_2_0_out_layers_3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op", "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.resnets.1.time_emb_proj": "input_blocks_5_0_emb_layers_1", "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.resnets.2.conv2": "output_blocks_2_0_out_layers_3", UPSAMPLER: "output_blocks_2_2_conv", "up_blocks.1.resnets.0.conv1": "output_blocks_3_0_in_layers_2",
}


def test_convolutions_of_sdxl_have_the_original_names_and_come_back(every: dict[str, bases.Base], tmp_path: Path) -> None:
    """Those that kohya's scripts train with conv_dim, the resamplings among them."""
    base, g, tensors, merged = every["sdxl"], torch.Generator().manual_seed(0), {}, copy.deepcopy(every["sdxl"].unet)
    for layer in CONVOLUTIONS:
        module = merged.get_submodule(layer)
        down, up = (0.3 * torch.randn(shape, generator=g) for shape in ((2, *module.weight.shape[1:]), (len(module.weight), 2, *(1,) * (module.weight.dim() - 2))))
        tensors |= as_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up})
        down, up = (tensors[f"unet.{layer}.lora_{factor}.weight"].float() for factor in "AB")
        module.weight.data += LORA.alpha / 2 * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    (tmp_path / "ada.safetensors").write_bytes(lora_file(tensors, LORA, "kohya", family="sdxl"))
    names = {key.partition(".")[0].removeprefix("lora_unet_") for key in load((tmp_path / "ada.safetensors").read_bytes())}
    assert names == set(CONVOLUTIONS.values())
    assert read_foreign(tmp_path / "ada.safetensors", base).factors.keys() == tensors.keys()
    own = base.pipe.unet
    base.pipe.unet = merged
    wanted = latents(base, "sks man")
    base.pipe.unet = own
    assert torch.allclose(drawn(base, "sks man", tmp_path / "ada.safetensors"), wanted, atol=1e-4)


def test_an_upsampler_is_counted_after_its_blocks_attention_where_it_has_one(every: dict[str, bases.Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first, place in (("CrossAttnUpBlock2D", 2), ("UpBlock2D", 1)):
        config = {**every["sdxl"].unet.config, "up_block_types": (first, "UpBlock2D")}
        monkeypatch.setattr(every["sdxl"].pipe, "unet", UNet2DConditionModel.from_config(config))
        for index in (1, 2):
            name = f"lora_unet_output_blocks_2_{index}_conv"
            (tmp_path / "theirs.safetensors").write_bytes(save({f"{name}.lora_down.weight": torch.ones(1, 32, 3, 3), f"{name}.lora_up.weight": torch.ones(32, 1, 1, 1)}))
            if index == place:
                assert f"unet.{UPSAMPLER}.lora_A.weight" in read_foreign(tmp_path / "theirs.safetensors", every["sdxl"]).factors
            else:
                with pytest.raises(RecipeError, match="has no such layer"):
                    read_foreign(tmp_path / "theirs.safetensors", every["sdxl"])


def test_a_pickle_is_known_by_its_name_too_and_a_whole_base_by_its_size(sd: bases.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.ckpt").write_bytes(save(GOOD))
    with pytest.raises(InputError, match="is pickled"):
        read_foreign(tmp_path / "old.ckpt", sd)
    with pytest.raises(InputError, match=r"'none\.safetensors' is no file here"):
        read_foreign(tmp_path / "none.safetensors", sd)
    monkeypatch.setattr("models.diffusion.imports.MOST_BYTES", 100)
    (tmp_path / "big.safetensors").write_bytes(save(GOOD))
    with pytest.raises(InputError, match="is it a whole base"):
        read_foreign(tmp_path / "big.safetensors", sd)


def test_nothing_of_a_refused_file_stays_in_the_base(sd: bases.Base, tmp_path: Path) -> None:
    before: Any = [type(module) for module in sd.unet.modules()]
    (tmp_path / "theirs.safetensors").write_bytes(save(GOOD | {"something": torch.ones(2, 2)}))
    with pytest.raises(RecipeError):
        drawn(sd, "sks man", tmp_path / "theirs.safetensors")
    assert [type(module) for module in sd.unet.modules()] == before
