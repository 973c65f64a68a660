"""The stages train and sample over a real Store, for every method; checkpoints that were damaged in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from likeness.errors import IntegrityError
from likeness.recipe import METHODS, Choice, DreamBooth, Lora, Objective, Pivotal, Recipe, TextualInversion
from likeness.records import (
    Adapter,
    BatteryPrompt,
    Caption,
    ClassPictures,
    Consent,
    Enrolment,
    FaceMeasures,
    Portrait,
    SampleSet,
    Subject,
    TrainingSet,
)
from likeness.settings import Battery, Sampling, load_settings
from likeness.stages import Call
from likeness.store import MemoryStore
from models.diffusion import checkpoint, class_pictures
from models.diffusion.batches import TrainingInputs, encode
from models.diffusion.loop import Job, fit
from models.diffusion.methods import plan_of, step_of
from models.maquette.companions import read_base_scores, read_class_pictures
from tasks import pictures, sampling, training
from tasks.runtime import Tools

RECIPES: dict[str, Recipe] = {
    "dreambooth": DreamBooth(steps=5, batch=1, checkpoint_every=2), "lora": Lora(steps=5, batch=1, rank=2, checkpoint_every=2),
    "textual_inversion": TextualInversion(steps=5, batch=1, vectors=2, checkpoint_every=2),
    "pivotal": Pivotal(steps=5, batch=1, rank=2, vectors=2, targets=("attention",), checkpoint_every=2),
}
every_method = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
pytestmark = pytest.mark.timeout(900)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {"truncated": lambda d: d[:-7], "flipped": lambda d: d[:999] + bytes([d[999] ^ 1]) + d[1000:],
                                                "foreign": lambda d: checkpoint.write(checkpoint.read(d, training="mine"), training="another's")}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    torch.set_num_threads(1)
    settings = load_settings(overrides={"home": str(tmp_path_factory.mktemp("home"))})
    battery = Battery(name="one", seeds=1, prompts=(BatteryPrompt(category="plain", template="a photo of a {who}"),))
    return Tools(settings.model_copy(update={"battery": battery, "sampling": Sampling(steps=2, bare=2)}))


@pytest.fixture(scope="module")
def training_set(tools: Tools) -> TrainingSet:
    """Two portraits of two rendered women, in the tools' store; their subject is enrolled."""
    subject = Subject(id="ada", noun="woman", consent=Consent(source="rendered"))
    tools.enrol(Enrolment(subject=subject, source="nowhere"))
    images, _ = read_class_pictures("woman", side_px=128)
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 40:88] = 255
    face = FaceMeasures(box_px=(32.0, 32.0, 96.0, 96.0), eye_distance_px=25.0, roll_deg=0.0, sharpness=10.0, score=1.0, visible=1.0)
    portraits = tuple(Portrait(photo=str(i) * 64, crop=pictures.put(tools.store, "subjects/ada/portraits", images[i]), side_px=128, framing="tight", face=face,
                               mask=pictures.put(tools.store, "subjects/ada/portraits", mask), embedding=(0.0,)) for i in range(2))
    captions = tuple(Caption(portrait=p.digest, text="a photo of zqaa woman", source="slots") for p in portraits)
    return TrainingSet(subject=subject.digest, trigger="zqaa", noun="woman", portraits=portraits, captions=captions, held_out=())


def trained(tools: Tools, training_set: TrainingSet, recipe: Recipe) -> Adapter:
    call = Call(stage="train", subject="ada", params={"recipe": recipe.plain()})
    outcome = tools.once(call, lambda claim: training._train(tools, call, training_set, recipe, claim), Adapter)
    return tools.open(outcome.ref, "ada", Adapter)


@every_method
def test_every_method_goes_from_portraits_to_an_adapter_to_samples(tools: Tools, training_set: TrainingSet, recipe: Recipe) -> None:
    adapter = trained(tools, training_set, recipe)
    assert (adapter.recipe, adapter.steps) == (recipe.digest, 5)
    tensors, header = checkpoint.read_adapter(training.weights_of(tools.store, adapter))
    assert header == {"method": recipe.method, "training_set": training_set.digest, "recipe": recipe.digest, "base": tools.base_ref.digest, "trigger": "zqaa"}
    assert {v.dtype for k, v in tensors.items() if not k.startswith("vectors.")} <= {torch.float16}
    assert adapter.weights.size < 26_000_000
    assert not list(tools.store.list("subjects/ada/stages/train/" + Call(stage="train", subject="ada", params={"recipe": recipe.plain()}).key + "/"))
    call = Call(stage="sample", subject="ada", params={"recipe": recipe.plain(), "of": adapter.digest})
    outcome = tools.once(call, lambda claim: sampling._sample(tools, call, training_set, adapter, tools.settings.battery, claim), SampleSet)
    whole = tools.open(outcome.ref, "ada", SampleSet)
    (drawn,) = whole.samples
    assert drawn.prompt == "a photo of a zqaa woman"
    assert [(s.prompt, s.seed) for s in whole.bare] == [("a photo of a woman", 0), ("a photo of a woman", 1)]
    assert pictures.get(tools.store, drawn.image).shape == (128, 128, 3)


def test_a_chosen_checkpoint_is_in_the_record_with_the_witness_that_chose(tools: Tools, training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real recogniser and slot reader. A worker that dies with its first checkpoint written goes on to the same record."""
    portraits = tuple(p.model_copy(update={"embedding": (0.1 * i,) * 128}) for i, p in enumerate(training_set.portraits))
    held_out = tuple(p.model_copy(update={"photo": c * 64, "embedding": (0.05,) * 128}) for p, c in zip(portraits, "ab", strict=True))
    chooses = training_set.model_copy(update={"portraits": portraits, "held_out": held_out})
    recipe = Lora(steps=3, batch=1, rank=2, targets=("attention",), checkpoint_every=9, objective=Objective(prior_weight=0.0),
                  choice=Choice(points=2, first=0.5, denoising_steps=1))

    class Died(BaseException):
        pass

    honest = training._keeper

    def dying(*args: object) -> object:
        keep = honest(*args)  # type: ignore[arg-type]

        def kept(state: object) -> None:
            keep(state)  # type: ignore[arg-type]
            raise Died
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(training, "_keeper", dying)
        with pytest.raises(Died):
            trained(tools, chooses, recipe)
    resumed = trained(tools, chooses, recipe)
    assert resumed.curve is not None
    assert [(p.step, p.samples) for p in resumed.curve.points] == [(2, 1), (3, 1)]
    assert all(p.identity is not None and p.obedience is None for p in resumed.curve.points)      # the battery of one plain prompt asks for nothing
    assert resumed.curve.witnesses == (held_out[0].digest,)
    assert resumed.steps == resumed.curve.chosen
    again = Tools(tools.settings.model_copy(update={"home": tools.settings.home / "other"}))
    again.enrol(tools.standing("ada"))
    again.__dict__.update(base=tools.base, faces=tools.faces, slots=tools.slots, bank=tools.bank)
    for p in training_set.portraits:
        for ref in (p.crop, p.mask):
            again.store.put_if_absent(ref.key, tools.store.get(ref.key) or b"")
    assert trained(again, chooses, recipe) == resumed


def test_what_chooses_is_part_of_the_key_and_nothing_is_where_nobody_chooses(tools: Tools) -> None:
    assert training._choice(tools, Lora()) == {}
    found = training._choice(tools, Lora(choice=Choice(points=2)))["choice"]
    assert found["backend"] == tools.faces.recogniser_name
    assert (found["bank"], found["slots"]) == (tools.bank.digest, tools.slots_digest)
    assert [prompt["template"] for prompt in found["prompts"]] == ["a photo of a {who}"]


def test_what_the_base_alone_does_is_measured_once_and_kept_in_the_store(tools: Tools) -> None:
    again = Tools(tools.settings)
    assert again.base_scores("man") is None
    found = tools.base_scores("man", measure=True)
    assert found is not None and found.samples == 8 and found.battery == tools.settings.battery.digest
    again.__dict__["base"] = None                      # whoever draws now fails
    assert again.base_scores("man", measure=True) == found
    assert len(list(tools.store.list("base-scores/"))) == 1
    assert Tools(load_settings(overrides={"home": str(tools.settings.home)})).base_scores("man") == read_base_scores(
        "man", revision=tools.base_ref.revision, battery=load_settings().battery.digest), "the shipped battery has shipped scores"


def test_methods_are_all_tried() -> None:
    assert set(RECIPES) == set(METHODS)


def test_a_noun_without_class_pictures_can_be_trained_where_none_are_wanted(tools: Tools, training_set: TrainingSet) -> None:
    dog = training_set.model_copy(update={"noun": "dog"})
    assert trained(tools, dog, TextualInversion(steps=1, batch=1, seed=1)).steps == 1
    assert trained(tools, dog, Lora(steps=1, batch=1, rank=2, objective=Objective(prior_weight=0.0))).steps == 1


def test_a_base_without_class_pictures_draws_them_once_for_all_subjects(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_pictures, "COUNT", 3)
    monkeypatch.setattr(class_pictures, "STEPS", 1)
    other, later = Tools(tools.settings), Tools(tools.settings.model_copy(update={"sampling": Sampling(steps=9, guidance=1.0)}))          # how samples are drawn is no matter
    for one in (other, later):
        one.__dict__["base_ref"] = tools.base_ref.model_copy(update={"name": "sd15"})
    other.__dict__["base"] = tools.base
    beats: list[str] = []
    images, captions = other.class_pictures("woman", beat=beats.append)
    assert images.shape == (3, 128, 128, 3) and len(set(captions)) == 3
    assert all(" woman" in words and tools.base.trigger not in words for words in captions)
    assert beats[-1] == "drawing picture 3 of 3 of a woman"
    later.__dict__["base"] = None                      # whoever draws now fails
    again, words = later.class_pictures("woman")
    assert np.array_equal(again, images) and words == captions
    [record] = [key for key in tools.store.list("class-pictures/") if key.endswith(".json")]
    kept = ClassPictures.read(tools.store.get(record) or b"")
    tools.store.delete(kept.pictures[0].key)
    with pytest.raises(IntegrityError):
        later.class_pictures("woman")


def test_no_two_captions_of_a_class_are_alike() -> None:
    captions = class_pictures.captions_of("dog")
    assert len(set(captions)) == len(captions) == 48


def test_a_decoder_is_tuned_on_class_pictures_where_some_ship(tools: Tools, training_set: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(training, "encode", lambda *a, **k: seen.append(len(k["class_captions"])) or encode(*a, **k))
    none = Objective(prior_weight=0.0)
    for seed, (noun, steps) in enumerate((("woman", 1), ("woman", 0), ("dog", 1)), 70):          # seeds of their own, or what others trained is found
        trained(tools, training_set.model_copy(update={"noun": noun}), Lora(steps=1, batch=1, rank=2, objective=none, decoder_steps=steps, seed=seed))
    assert seen == [len(read_class_pictures("woman", side_px=128)[1]), 0, 0]
    other = Tools(tools.settings)
    other.__dict__["base_ref"] = tools.base_ref.model_copy(update={"name": "sd15"})
    assert other.shipped_class_pictures("woman")[1] == []


@pytest.fixture(scope="module")
def inputs(tools: Tools) -> TrainingInputs:
    images, captions = read_class_pictures("woman", side_px=128)
    return encode(tools.base, crops_NSSC=images[:2], masks_NSS=np.full((2, 128, 128), 255, np.uint8), captions=["zqaa woman"] * 2,
                  class_images_MSSC=images[2:4], class_captions=captions[2:4], noun="woman")


@every_method
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tools: Tools, inputs: TrainingInputs, recipe: Recipe, damage: Callable[[bytes], bytes]) -> None:
    store, folder = MemoryStore(), "subjects/ada/stages/train/key"

    def job(**more: object) -> Job:
        return Job("ada", lambda: step_of(tools.base, inputs, recipe), plan_of(recipe), **more)  # type: ignore[arg-type]

    [whole] = fit([job(on_checkpoint=training._keeper(store, folder, "mine"))])
    before, last = sorted(store.list(folder + "/"))
    data = store.get(last)
    assert data is not None
    store.delete(last)
    store.put_if_absent(last, damage(data))
    found = training.newest_checkpoint(store, folder, "mine")
    assert found is not None
    assert (found.step, list(store.list(folder + "/"))) == (2, [before])
    [resumed] = fit([job(resume=found, on_checkpoint=training._keeper(store, folder, "mine"))])
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.tensors[k], whole.tensors[k]) for k in whole.tensors)
    assert store.get(last) == data
