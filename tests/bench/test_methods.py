"""`make bench-methods`: the arithmetic of paired rows, the check of the reference scripts, what a process spent, what a cell of files is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from bench import methods, paired, rivals, spent, training
from bench.cells import Cells
from models.diffusion import bases
from models.faces import align


def seen(genuine: list[float], impostor: float = 0.7, *, right: list[int] | None = None, spread: float = 0.2) -> paired.Look:
    n = len(genuine)
    others = np.full((n, 3), impostor)
    others[np.isnan(genuine)] = np.nan
    return paired.Look(np.array(genuine), others, np.ones(n, bool), np.array(right if right is not None else [0] * n), np.full(n, 2),
                       spread * (1 - np.eye(n)), np.linspace(-0.1, 0.1, n), np.zeros(n, bool), np.zeros(n, bool), np.array([0.3, 0.9, np.nan, 0.9]))


# -- measures and intervals

def test_auc_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    own, theirs = rng.normal(0.4, 0.1, 40).round(2), np.sort(rng.normal(0.5, 0.1, 300).round(2))         # rounded: ties count half
    expected = roc_auc_score(np.r_[np.ones(40), np.zeros(300)], -np.r_[own, theirs])
    assert paired.auc(own, theirs) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(paired.auc(own[:0], theirs)) and math.isnan(paired.auc(own, theirs[:0]))


def test_a_sample_that_shows_nobody_is_not_accepted_and_of_no_pair() -> None:
    look = seen([0.3, 0.4, float("nan"), 0.9], right=[2, 1, 0, 0])
    look = replace(look, apart=np.array([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 9], [9, 9, 9, 0.0]]), yaw=np.array([0.1, -0.1, np.nan, 5.0]))
    got = paired.measure([look], paired.whole([look]))
    assert got["true_accepts"] == 0.5 and got["editability"] == 3 / 8
    assert got["diversity"] == 1.0 and got["pose_spread"] == pytest.approx(0.1)


def test_paintings_are_not_asked_who_they_show() -> None:
    look = replace(seen([0.3, 0.3, 2.0]), plain=np.array([True, True, False]))
    got = paired.measure([look], paired.whole([look]))
    assert got["auc"] == 1.0 and got["true_accepts"] == 1.0


def test_drift_is_the_share_of_pictures_of_the_class_that_are_the_user() -> None:
    look = seen([0.3, 0.3])
    assert paired.measure([look], paired.whole([look]))["drift"] == 0.25               # whoever has no face drifts nowhere
    assert paired.measure([look], [(0, np.arange(2), np.array([0, 0]))])["drift"] == 1.0


def test_a_sample_drawn_twice_is_no_pair_of_different_pictures() -> None:
    look = seen([0.3, 0.3])
    assert math.isnan(paired.measure([look], [(0, np.array([1, 1]), np.array([0]))])["diversity"])


def test_a_row_against_itself_differs_by_nothing() -> None:
    looks = [seen([0.3, 0.5, 0.8], right=[1, 0, 2]), seen([0.6, 0.2, 0.4], right=[2, 2, 0])]
    found = paired.differences(looks, looks, resamples=50)
    assert all(value == (0.0, 0.0, 0.0) for value in found.values())
    assert not paired.held(found)[0]               # nothing lies above 0


def test_the_same_samples_are_drawn_for_both_rows() -> None:
    """Users and samples differ widely, the two rows by the same half slot everywhere: only a paired resample knows that."""
    rng = np.random.default_rng(1)
    theirs = [seen([0.3] * 12, right=rng.integers(0, 2, 12).tolist()) for _ in range(3)]
    ours = [replace(look, right=look.right + 1) for look in theirs]
    assert paired.differences(ours, theirs, resamples=100)["editability"] == pytest.approx((0.5, 0.5, 0.5))


def test_rows_of_other_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same users and samples"):
        paired.differences([seen([0.3, 0.3])], [seen([0.3])])


@pytest.mark.parametrize(("auc", "editability", "diversity", "good", "why"), [
    ((0.1, 0.05, 0.2), (0.1, 0.01, 0.2), (0.0, -0.02, 0.02), True, "above 0: auc, editability"),
    ((0.1, 0.05, 0.2), (0.0, -0.02, 0.2), (0.0, -0.02, 0.02), False, "above 0 only: auc"),
    ((0.1, 0.05, 0.2), (0.1, 0.01, 0.2), (0.0, -0.031, 0.02), False, "diversity begins below"),
    ((0.1, 0.05, 0.2), (0.1, 0.01, 0.2), (math.nan, math.nan, math.nan), False, "not measured: diversity"),
], ids=["held", "one above", "one below", "not measured"])
def test_bars(auc: tuple[float, ...], editability: tuple[float, ...], diversity: tuple[float, ...], good: bool, why: str) -> None:
    held, because = paired.held({"auc": auc, "editability": editability, "diversity": diversity})
    assert held is good and why in because


def test_contradicting_slots_are_those_that_most_portraits_do_not_show() -> None:
    portraits = [{"hat": (hat, 0.9), "expression": ("smile", 0.5)} for hat in ("none", "none", "beanie")]
    assert methods.contradictions(portraits, [{"hat": "beanie"}, {"hat": "none", "expression": "surprised"}, {"expression": "smile"}, {}]) == [
        {"hat": "beanie"}, {"expression": "surprised"}, {}, {}]


def test_yaw_is_zero_in_front_and_turns_with_the_nose_whatever_the_roll_and_scale() -> None:
    frontal = align.FACE_TEMPLATE
    turned = frontal + np.array([[0, 0]] * 4 + [[0.3, 0]])
    roll = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    assert methods.yaw_of(frontal) == pytest.approx(0, abs=1e-9)
    mirrored = (turned * [-1, 1])[[2, 3, 0, 1, 4]]            # the eyes keep their order, viewer's right first
    assert methods.yaw_of(turned) > 0.2 and methods.yaw_of(mirrored) == pytest.approx(-methods.yaw_of(turned))
    assert methods.yaw_of(30 * turned @ roll.T + 64) == pytest.approx(methods.yaw_of(turned))


def test_an_ablation_leaves_out_one_thing_and_is_for_a_measure() -> None:
    rows = {row.name: row.recipe for row in methods.ablation_rows()}
    whole = rows["lora"].whole()
    for name, (measure, _) in methods.ABLATIONS.items():
        other = rows[name].whole()
        changed = {k for k in whole if k != "objective" and other[k] != whole[k]} | {k for k in whole["objective"] if other["objective"][k] != whole["objective"][k]}
        assert changed and measure in paired.MEASURES, name
        assert len(changed) == 1 or changed == {"prior", "prior_weight"}, name          # one thing: what keeps the class, and how much
    for method in methods.ALSO_KEEP:
        usual = rows[method]
        for name in methods.PRIORS:
            other = rows[f"{method}, {name}"]
            assert usual is not None and other is not None
            assert other != usual
            assert other.objective.wants_class_pictures is (name == methods.CLASS_PICTURES)
            assert other.plain() | {"objective": usual.plain()["objective"]} == usual.plain()


def test_rows_that_were_not_asked_for_are_not_compared() -> None:
    rows = methods.ablation_rows()
    pairs = methods.comparisons(rows)
    assert {other for _, other in pairs} == {row.name for row in rows} - {"lora", methods.MASK, *methods.ALSO_KEEP}
    named = ("pivotal", f"pivotal, {methods.CLASS_PICTURES}", "no face mask")
    assert methods.comparisons([row for row in rows if row.name in named]) == [named[:2]]


# -- the reference scripts

def test_without_a_folder_the_message_says_how_to_get_the_scripts() -> None:
    with pytest.raises(rivals.NoScripts, match=r"github\.com/huggingface/diffusers at tag v0\.40\.0.*REFERENCE_SCRIPTS=FOLDER"):
        rivals.scripts_folder(None)


def test_a_missing_or_altered_script_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rivals.NoScripts, match=r"train_dreambooth_lora\.py is not in the folder"):
        rivals.scripts_folder(str(tmp_path))
    for name in rivals.SHA256:
        (tmp_path / name).write_text(f"# {name}\n")
    with pytest.raises(rivals.NoScripts, match=rivals.SHA256["train_dreambooth_lora.py"]):
        rivals.scripts_folder(str(tmp_path))
    monkeypatch.setattr(rivals, "SHA256", {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in rivals.SHA256})
    assert rivals.scripts_folder(str(tmp_path)) == tmp_path
    with (tmp_path / "textual_inversion.py").open("a") as script:
        script.write(" ")
    with pytest.raises(rivals.NoScripts, match=r"textual_inversion\.py is not that of v0\.40\.0"):
        rivals.scripts_folder(str(tmp_path))


def test_a_script_is_told_what_ours_is_told() -> None:
    told = {name: rival.arguments(trigger="zqaa", noun="woman", steps=200, batch=4, seed=0, side_px=128, class_count=48) for name, rival in rivals.RIVALS.items()}
    for name, arguments in told.items():
        pairs = dict(pairwise(arguments))
        assert (pairs["--max_train_steps"], pairs["--train_batch_size"], pairs["--seed"], pairs["--resolution"]) == ("200", "4", "0", "128"), name
        assert "--validation_prompt" not in arguments
    assert "a photo of a zqaa woman" in told["lora"] and "--with_prior_preservation" in told["dreambooth"]
    assert rivals.WORD in told["textual_inversion"] and "--with_prior_preservation" not in told["textual_inversion"]
    for rival in rivals.RIVALS.values():
        assert rival.rate in rival.rates


def test_what_textual_inversion_learnt_is_what_its_word_means(tmp_path: Path) -> None:
    base = bases.load("maquette")
    vector = base.pipe.text_encoder.get_input_embeddings().weight[7].clone()
    (tmp_path / "out").mkdir()
    save_file({rivals.WORD: vector[None]}, tmp_path / "out" / "learned_embeds.safetensors")
    made = rivals.base_with(rivals.RIVALS["textual_inversion"], tmp_path)
    [number] = made.pipe.tokenizer.encode(rivals.WORD, add_special_tokens=False)
    assert bool((made.pipe.text_encoder.get_input_embeddings().weight[number] == vector).all())
    assert rivals.WORD not in base.pipe.tokenizer.get_vocab()


# -- what a process spent

PROGRAM = """
import sys, time
def burn(s):
    end = time.process_time() + s
    while time.process_time() < end: pass
burn(0.3)
for step in range(1, 21):
    burn(0.02)
    sys.stderr.write(f"\\rSteps:  {5 * step}%|...| {step}/20 [00:00<00:00, 9it/s]"); sys.stderr.flush()
burn(0.2)
sys.stderr.write("\\nLoading pipeline components...: 100%|...| 7/7 [00:00<00:00]\\n")
"""


def test_imports_and_what_comes_after_are_not_in_a_step(tmp_path: Path) -> None:
    got = spent.run_measured([sys.executable, "-c", PROGRAM], log=tmp_path / "log", cwd=tmp_path, env=os.environ)
    assert got.steps == 20
    assert 0.01 < got.core_s_per_step < 0.04           # 10 ms is the clock's tick
    assert got.core_s > 0.85 and got.peak_mib > 3


def test_memory_is_the_programs_own_and_not_what_its_parent_holds(tmp_path: Path) -> None:
    held = bytearray(os.urandom(1) * (400 << 20))
    got = spent.run_measured([sys.executable, "-c", PROGRAM], log=tmp_path / "log", cwd=tmp_path, env=os.environ)
    assert len(held) and got.peak_mib < 200


def test_a_program_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        spent.run_measured([sys.executable, "-c", "raise SystemExit('no such luck')"], log=tmp_path / "log", cwd=tmp_path, env=os.environ)


def test_steps_are_counted_once_they_have_settled() -> None:
    assert spent.per_step([(1, 9.0), (10, 20.0), (30, 30.0)], 30) == 0.5
    with pytest.raises(ValueError, match="two different steps"):
        spent.per_step([(1, 9.0), (30, 20.0)], 30)


def test_a_training_of_ours_leaves_an_adapter_and_says_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = methods.recipe_of({"method": "lora", "base": "maquette", "steps": 2, "batch": 1, "checkpoint_every": 1, "decoder_steps": 1})
    crops = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    training.prepare(tmp_path, recipe, noun="man", crops=crops, masks=np.full((2, 128, 128), 255, np.uint8), captions=["a photo of a zqaa man"] * 2,
                     class_images=crops, class_captions=["a photo of a man"] * 2)
    training.main(tmp_path)
    assert [m[1] for m in spent.STEP.finditer(capsys.readouterr().out)] == ["2"]
    adapter, halfway = load_file(tmp_path / training.ADAPTER), load_file(tmp_path / "at-1.safetensors")
    assert halfway.keys() == {k for k in adapter if not k.startswith("delta.vae.")} and len(halfway) < len(adapter)


# -- cells of files

def test_a_cell_of_files_is_made_once_and_whole(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    cells = Cells(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cells.files("a", {"w": 1}, broken)
    assert not cells.has("a", {"w": 1})
    folder = cells.files("a", {"w": 1}, lambda folder: (folder / "n").write_text(json.dumps(1)))
    assert [p.name for p in folder.iterdir()] == ["n"] and cells.has("a", {"w": 1}) and not cells.has("a", {"w": 2})
    assert cells.files("a", {"w": 1}, broken) == folder
