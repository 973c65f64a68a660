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
from diffusers import StableDiffusionPipeline
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
GOOD = {A: torch.ones(2, 24), B: torch.ones(32, 2)}


def _header(length: int) -> bytes:
    return length.to_bytes(8, "little") + b"{}" + b" " * 100


@pytest.mark.parametrize(("data", "kind", "words"), [
    (lambda: save(GOOD)[:-8], InputError, "not a whole safetensors file: get it again"),
    (lambda: save(GOOD)[:5], InputError, "not a whole safetensors file"),
    (lambda: _header(2**40), InputError, "header is longer than the file"),
    (lambda: (2).to_bytes(8, "little") + b"{}", InputError, "holds no tensors"),
    (lambda: (4).to_bytes(8, "little") + b"[{}]", InputError, "not a whole safetensors file"),
    (lambda: pickle.dumps(GOOD), InputError, "is pickled: such files run code"),
    (lambda: b"PK\x03\x04" + bytes(99), InputError, "is pickled"),
    (lambda: save(GOOD | {A: torch.full((2, 24), float("nan"))}), InputError, "lora_A.weight holds values that are no numbers"),
    (lambda: save(GOOD | {A: torch.ones(2, 24, dtype=torch.int64)}), InputError, "holds values that are no numbers"),
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
    (lambda: save(GOOD, {"lora_adapter_metadata": "["}), RecipeError, "notes of diffusers that cannot be read"),
    (lambda: save({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}), RecipeError, "width 768 and 1280, base 'tiny-sd15' has words of width 24; the file seems to be for SDXL"),
    (lambda: save({"<ada>": torch.ones(2, 768)}), RecipeError, "seems to be for Stable Diffusion 1.x"),
    (lambda: save({"<ada>": torch.ones(65, 24)}), RecipeError, "65 vectors: 1 to 64"),
    (lambda: save({"<ada>": torch.tensor(1.0)}), RecipeError, "vectors of width 1"),
    (lambda: save({"clip_l": torch.tensor(1.0), "clip_g": torch.tensor(1.0)}), RecipeError, "vectors of width 1 and 1"),
    (lambda: save({A: torch.tensor(1.0), B: torch.ones(32, 2)}), RecipeError, f"layer unet.{ATTENTION} has no rank"),
    (lambda: save({A: torch.ones(0, 24), B: torch.ones(32, 0)}), RecipeError, "has no rank"),
    (lambda: save(GOOD | {f"unet.{ATTENTION}.alpha": torch.ones(2)}), RecipeError, "has an alpha of 2 numbers"),
    (lambda: save(GOOD, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "x"})}), RecipeError, "notes of diffusers that cannot be read"),
    (lambda: save(GOOD, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": [1]})}), RecipeError, "notes of diffusers that cannot be read"),
    (lambda: save(GOOD, {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": [1]})}), RecipeError, "notes of diffusers that cannot be read"),
    (lambda: (20_000).to_bytes(8, "little") + b"[" * 20_000, InputError, "not a whole safetensors file"),
    (lambda: save(GOOD | {"lora_unet_x.diff": torch.ones(2, 2)}), RecipeError, "holds weights beside factors"),
    (lambda: save({"model.diffusion_model.out.2.weight": torch.ones(2, 2), "first_stage_model.x": torch.ones(2)}), RecipeError, "is a whole base in one file"),
])
def test_what_is_damaged_or_does_not_fit_is_refused_by_name(sd: bases.Base, tmp_path: Path, data: Callable[[], bytes], kind: type[Exception], words: str) -> None:
    file = tmp_path / "theirs.safetensors"
    file.write_bytes(data())
    with pytest.raises(kind, match=words):
        read_foreign(file, sd)


def test_a_header_of_any_length_is_no_pickle(sd: bases.Base, tmp_path: Path) -> None:
    """A length may begin as a pickle or a zip does."""
    file, firsts = tmp_path / "theirs.safetensors", set()
    for padding in range(0, 264, 8):
        data = save(GOOD, {"note": "x" * padding})
        firsts.add(data[0])
        file.write_bytes(data)
        assert set(read_foreign(file, sd).factors) == {A, B}
    assert 0x80 in firsts


def test_an_alpha_may_be_a_whole_number(sd: bases.Base, tmp_path: Path) -> None:
    (tmp_path / "theirs.safetensors").write_bytes(save(GOOD | {f"unet.{ATTENTION}.alpha": torch.tensor(4)}))
    assert torch.equal(read_foreign(tmp_path / "theirs.safetensors", sd).factors[B], 2 * GOOD[B])


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
