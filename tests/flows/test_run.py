"""`likeness run` as a user has it: a process, its exit code, its JSON, its files. Recipes are tiny; every network is the real one."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from likeness.gate import GATED
from likeness.lineage import walk
from likeness.store import LocalStore
from tests.processes import SERVER, Warm, cold, environment

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT / "examples" / "demo"
CONFIG = """
[recipe]
steps = 12
checkpoint_every = 4
batch = 2
rank = 4
decoder_steps = 4
targets = ["attention"]
[sampling]
steps = 4
[battery]
name = "small"
seeds = 4
prompts = [{category = "plain", template = "a photo of a {who}"}, {category = "place", template = "a photo of a {who} on a beach"}]
"""
# A policy under which anything passes: what is tested with it is what happens after acceptance.
UNCOMPARED = "min_editability_share = 0.0\nmin_diversity_share = 0.0\nmax_drift_share = 1.0\nmax_more_seeds = 0\n"        # with what the base alone does, which would be drawn first
OPEN_GATE = "\n[gate]\nmin_identity_share = 0.0\nmin_face_share = 0.0\nmax_copy_share = 1.0\nmax_defect_share = 1.0\n" + UNCOMPARED
pytestmark = pytest.mark.timeout(1800)


def likeness(home: Path, *words: str, config: str = CONFIG, own_server: bool = False, more: Mapping[str, str] | None = None) -> Warm:
    """`likeness WORDS`, at the tests' Prefect server unless it brings its own; `more` is added to its environment."""
    return Warm(words, environment(home, config, api=None if own_server else SERVER.api) | dict(more or {}), home)


def finish(process: Warm | subprocess.Popen[str]) -> tuple[int, Any, str]:
    out, err = process.communicate(timeout=1500)
    return process.returncode, json.loads(out) if out else None, err


def run(home: Path, config: str = CONFIG, photos: Path = PHOTOS, own_server: bool = False) -> tuple[int, Any, str]:
    return finish(likeness(home, "run", str(photos), "--subject", "ada", "--class", "man", "--json", config=config, own_server=own_server))


def published(home: Path) -> set[str]:
    return {p.parent.name for p in (home / "store" / "subjects" / "ada" / "stages").glob("*/*.json") if b'"published"' in p.read_bytes()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    code, result, err = finish(cold(home, "run", str(PHOTOS), "--subject", "ada", "--class", "man", "--json", config=CONFIG + OPEN_GATE))
    assert code == 0, err
    return home, result


def test_an_accepted_run_ends_registered_with_its_whole_contract(undisturbed: tuple[Path, Any]) -> None:
    _home, result = undisturbed
    assert result["verdict"] == "accepted"
    assert result["release"] == {"model": "likeness.ada", "version": 1}
    assert result["executed"] == ["ingest", "crop", "caption", "assemble", "train", "sample", "judge", "register"]
    assert result["reused"] == []
    assert {"training_set", "recipe", "adapter"} <= result["digests"].keys()
    html = Path(result["report"]).read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "data:image/webp" in html


def test_every_sample_is_looked_at_for_defects(undisturbed: tuple[Path, Any]) -> None:
    home, result = undisturbed
    [judged] = [json.loads(p.read_text())["output"] for p in (home / "store" / "subjects" / "ada" / "stages" / "judge").glob("*.json")]
    scores = judged["measured"]["scores"]
    assert [len(row) for row in judged["measured"]["apart"]] == list(range(len(scores)))
    found = [{f["code"] for f in s["findings"]} for s in scores]
    assert [bool(codes & {"no_face", "extra_face"}) for codes in found] == [s["faces"] != 1 for s in scores]
    assert result["scores"]["defect_share"] == sum(bool(codes & GATED) for codes in found) / len(scores)
    clean = {s["image"] for s, codes in zip(scores, found, strict=True) if not codes & GATED}
    assert set(judged["verdict"]["delivered"]) <= clean


def test_the_second_run_makes_nothing_and_the_lineage_holds_until_a_byte_is_changed(undisturbed: tuple[Path, Any]) -> None:
    home, result = undisturbed
    code, again, err = run(home, CONFIG + OPEN_GATE)
    assert code == 0, err
    assert again["executed"] == []
    assert again["digests"] == result["digests"]
    assert again["release"] == result["release"]
    code, chain, err = finish(likeness(home, "lineage", "ada", "--json"))
    assert (code, chain["ok"]) == (0, True), err
    assert {link["stage"] for link in chain["chain"]} == {"ingest", "crop", "caption", "assemble", "train", "sample", "judge", "register"}
    assert len(chain["photos"]) >= 8
    code, touched, _ = finish(likeness(home, "audit", "--photo", chain["photos"][0], "--json"))
    assert [r["version"] for r in touched["releases"]] == [1]
    blob = next((home / "store" / "subjects" / "ada" / "portraits").iterdir())
    whole = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code, chain, _ = finish(likeness(home, "lineage", "ada", "--json"))
        assert (code, chain["ok"]) == (1, False)
    finally:
        blob.write_bytes(whole)


def test_a_release_leaves_for_other_programs_in_a_format_that_fits(undisturbed: tuple[Path, Any]) -> None:
    home, _ = undisturbed
    code, written, err = finish(likeness(home, "export", "ada", "--format", "kohya", "--json"))
    assert (code, written) == (0, {"subject": "ada", "format": "kohya", "file": "ada-kohya.safetensors"}), err
    assert any(name.startswith("lora_unet_") for name in load((home / "ada-kohya.safetensors").read_bytes()))
    for form, words in (("embedding", "choose diffusers or kohya"), ("onnx", "choose diffusers, kohya, embedding")):
        code, written, err = finish(likeness(home, "export", "ada", "--format", form, "--json"))
        assert (code, written) == (2, None)
        assert words in " ".join(err.split())


def test_each_release_has_its_own_lineage_and_a_forgotten_subject_is_nowhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    results = []
    for config in (CONFIG, CONFIG.replace("steps = 12", "steps = 8")):
        code, result, err = run(home, config + OPEN_GATE, own_server=True)        # forget erases what Prefect keeps in this home
        assert code == 0, err
        results.append(result)
    assert [r["release"]["version"] for r in results] == [1, 2]
    assert results[1]["executed"] == ["train", "sample", "judge", "register"]
    chains = [json.loads(p.read_text())["chain"] for p in (home / "mlflow-artifacts").rglob("lineage.json")]
    adapters = {r["digests"]["adapter"] for r in results}
    assert [len(chains), {next(link["digest"] for link in chain if link["stage"] == "train") for chain in chains}] == [4, adapters]      # beside run and model
    words = {*(link["digest"] for chain in chains for link in chain), *(r["digests"]["weights"] for r in results), "subjects/ada/", "personalize ada"}
    code, lineage, _ = finish(likeness(home, "lineage", "ada", "--json"))
    words |= set(lineage["photos"])

    def named() -> set[str]:
        """Where files still say who it was, by the first part of their path."""
        tombstone = home / "store" / "tombstones" / "ada.json"
        return {p.relative_to(home).parts[0] for p in home.rglob("*") if p.is_file() and p != tombstone
                and ("ada" in p.relative_to(home).parts or any(w.encode() in p.read_bytes() for w in words))}

    assert {"store", "mlflow.db", "mlflow-artifacts", "reports", "prefect"} <= named()          # the test can fail
    code, receipt, err = finish(likeness(home, "forget", "ada", "--yes", "--json", own_server=True))
    assert (code, receipt["clean"]) == (0, True), err
    assert receipt["searched_for"] > len(lineage["photos"])
    assert named() == set()
    code, none, err = run(home, CONFIG + OPEN_GATE, own_server=True)
    assert (code, none) == (2, None)
    assert "forgotten" in err


def test_an_adapter_is_not_drawn_on_another_base(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    home, _ = undisturbed
    other = tmp_path / "base"
    shutil.copytree(ROOT / "models" / "maquette" / "weights", other, ignore=shutil.ignore_patterns("manifest.json"))
    (other / "notes.txt").write_text("not the base that was trained on")
    code, drawn, err = finish(likeness(home, "sample", "ada", "ada", "--count", "1", "--json", config=f'base_folder = "{other}"\n' + CONFIG))
    assert (code, drawn) == (2, None)
    assert "trained on base 'maquette' as it was then" in " ".join(err.split())


def test_the_method_is_chosen_by_a_flag_and_its_adapter_is_drawn_and_exported(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, result, err = finish(likeness(home, "run", str(PHOTOS), "--subject", "ada", "--class", "man", "--method", "pivotal", "--json", config=CONFIG + OPEN_GATE))
    assert code == 0, err
    recipe = json.loads(next((home / "store" / "subjects" / "ada" / "stages" / "train").glob("*.json")).read_text())["params"]["recipe"]
    assert (recipe["method"], recipe["rank"], recipe["vectors"]) == ("pivotal", 4, 4)
    assert result["release"] is not None
    code, drawn, err = finish(likeness(home, "sample", "ada", "ada on a beach", "--count", "1", "--json", config=CONFIG + OPEN_GATE))
    assert (code, len(drawn["files"])) == (0, 1), err
    code, _, err = finish(likeness(home, "export", "ada", "--format", "embedding", "--out", "word.safetensors", "--json", config=CONFIG + OPEN_GATE))
    assert code == 0, err
    assert {k: v.shape for k, v in load((home / "word.safetensors").read_bytes()).items()} == {"<ada>": (4, 256)}


def test_where_too_few_may_be_delivered_more_seeds_are_drawn_judged_and_kept_with_their_lineage(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    home, config = elsewhere(undisturbed[0], tmp_path / "home"), CONFIG + OPEN_GATE.replace("max_more_seeds = 0", "max_more_seeds = 1")
    code, result, err = run(home, config)
    assert code == 0, err
    assert (result["verdict"], result["executed"]) == ("accepted", ["judge", "sample-more", "judge-more", "register"])
    assert {"sample-more", "judge-more"} <= result["seconds"].keys()
    stages = home / "store" / "subjects" / "ada" / "stages"
    drawn = {r["params"].get("more", 0): r["output"] for r in (json.loads(p.read_text()) for p in (stages / "sample").glob("*.json"))}
    battery, more = ({(s["prompt"], s["seed"]) for s in drawn[n]["samples"]} for n in (0, 1))
    assert {prompt for prompt, _ in more} == {prompt for prompt, _ in battery} and not more & battery
    assert (len(more), drawn[1].get("bare", [])) == (len({prompt for prompt, _ in battery}), [])
    assert result["digests"]["samples"] == undisturbed[1]["digests"]["samples"], "those that decided"
    with_more = [r for r in (json.loads(p.read_text()) for p in (stages / "judge").glob("*.json")) if len(r["inputs"]) == 4]
    assert [len(r["output"]["measured"]["more"]) for r in with_more] == [len(more)]
    html = Path(result["report"]).read_text()
    assert html.count("drawn besides<") == len(more)
    code, lineage, err = finish(likeness(home, "lineage", "ada", "--json", config=config))
    assert (code, lineage["ok"], [link["stage"] for link in lineage["chain"]].count("sample")) == (0, True, 2), err
    code, _, err = finish(likeness(home, "prune", "--json", config=config + "\n[retention]\nattempts_days = 0\n"))
    assert code == 0, err
    code, again, err = run(home, config)
    assert (code, again["executed"]) == (0, []), err


def test_a_method_that_is_none_is_exit_2_and_says_which_there_are(tmp_path: Path) -> None:
    code, result, err = finish(likeness(tmp_path / "home", "run", str(PHOTOS), "--subject", "ada", "--method", "magic", "--json"))
    assert (code, result) == (2, None)
    assert "'textual_inversion'" in err


def test_killed_at_every_stage_boundary_and_inside_training_it_ends_the_same(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    _, expected = undisturbed
    home = tmp_path / "home"
    made: list[str] = []
    killed_in_training = 0
    for _ in range(14):
        before = published(home)
        process = likeness(home, "run", str(PHOTOS), "--subject", "ada", "--class", "man", "--json", config=CONFIG + OPEN_GATE)
        while process.poll() is None:
            checkpoints = list((home / "store" / "subjects" / "ada" / "stages" / "train").glob("*/checkpoint-*")) if "train" not in before else []
            if len(published(home)) > len(before) or (checkpoints and killed_in_training < 2):      # twice in a row inside training
                killed_in_training += bool(checkpoints) and len(published(home)) == len(before)
                process.kill()
                break
            time.sleep(0.01)
        made += sorted(published(home) - before)
        _out, err = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
    code, result, err = run(home, CONFIG + OPEN_GATE)
    assert code == 0, err
    assert killed_in_training == 2
    assert len(made) == len(set(made)), "a published stage was executed again"
    assert result["digests"] == expected["digests"]
    with sqlite3.connect(home / "mlflow.db") as db:
        assert db.execute("select count(*) from model_versions where name = 'likeness.ada'").fetchone() == (1,)


def test_an_honest_refusal_is_exit_3_with_reasons_and_no_release(tmp_path: Path) -> None:
    code, result, err = run(tmp_path / "home", CONFIG + "\n[gate]\nmin_identity_share = 1.0\n")
    assert code == 3, err
    assert result["release"] is None
    assert "identity" in {r["code"] for r in result["reasons"]}
    assert all(r["message"] for r in result["reasons"])


# The second attempt is written down, because by the rules it would have the preset's steps: sixteen times as many.
REFUSED = ('ladder = [{method = "lora", steps = 24, checkpoint_every = 4, batch = 2, rank = 4, decoder_steps = 4, targets = ["attention"]}]\n' + CONFIG
           + "\n[gate]\nmin_identity_share = 1.0\n")
SECOND = ["train-2", "sample-2", "judge-2"]


def twice(home: Path, config: str) -> Warm:
    return likeness(home, "run", str(PHOTOS), "--subject", "ada", "--class", "man", "--attempts", "2", "--json", config=config)


def elsewhere(home: Path, to: Path) -> Path:
    """A home where all is published that is in `home`, and nothing registered."""
    shutil.copytree(home, to, ignore=shutil.ignore_patterns("mlflow*", "register", "reports"))
    return to


def judged(home: Path) -> int:
    return sum(b'"published"' in p.read_bytes() for p in (home / "store" / "subjects" / "ada" / "stages" / "judge").glob("*.json"))


@pytest.fixture(scope="module")
def refused_twice(undisturbed: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    home = elsewhere(undisturbed[0], tmp_path_factory.mktemp("refused") / "home")
    code, result, err = finish(twice(home, REFUSED))
    assert code == 3, err
    return home, result


def test_a_refusal_is_followed_by_the_next_recipe_and_the_second_command_makes_nothing(refused_twice: tuple[Path, Any]) -> None:
    home, result = refused_twice
    assert (result["verdict"], result["release"]) == ("retry", None)
    assert result["reused"] == ["ingest", "crop", "caption", "assemble", "train", "sample"]       # the first attempt's training is that of `undisturbed`
    assert result["executed"] == ["judge", *SECOND]
    first, second = result["attempts"]
    assert first["recipe"] != second["recipe"]
    assert "entry 1 of `ladder`, after: 0% of the samples" in second["why"]
    assert [a["scores"]["identity_share"] for a in (first, second)] == [0.0, 0.0]                 # equally unrecognisable: the nearer one counts
    nearer = int(second["scores"]["identity_position"] > first["scores"]["identity_position"])
    assert [a["counts"] for a in (first, second)] == [nearer == 0, nearer == 1]
    best = (first, second)[nearer]
    assert (result["digests"]["recipe"], result["scores"]) == (best["recipe"], best["scores"])
    assert "`--attempts 3`" in result["next"]["how"]
    assert (result["next"]["values"]["rank"], result["next"]["values"]["steps"]) == (4, 200)      # and the next recipe goes on from it by the rules
    assert f"steps 200 (was {(12, 24)[nearer]}), because 0% of the samples" in result["next"]["why"]
    html = Path(result["report"]).read_text()
    assert f"attempt {nearer + 1}, counts" in html
    assert "--attempts 3" in html
    code, again, err = finish(twice(home, REFUSED))
    assert code == 3, err
    assert again["executed"] == []
    assert {k: again[k] for k in ("attempts", "next", "digests", "scores")} == {k: result[k] for k in ("attempts", "next", "digests", "scores")}
    assert in_mlflow(home) == {"1": "retry", "2": "retry"}


def in_mlflow(home: Path) -> dict[str, str]:
    """Verdict of every run that MLflow nests below another, by number of the attempt."""
    with sqlite3.connect(home / "mlflow.db") as db:
        found = db.execute("select a.value, v.value from tags p join tags a on a.run_uuid = p.run_uuid and a.key = 'likeness.attempt' "
                           "join tags v on v.run_uuid = p.run_uuid and v.key = 'likeness.verdict_kind' where p.key = 'mlflow.parentRunId'").fetchall()
    assert len(found) == len(dict(found)), found
    return dict(found)


def test_killed_between_two_attempts_it_ends_the_same(undisturbed: tuple[Path, Any], refused_twice: tuple[Path, Any], tmp_path: Path) -> None:
    home = elsewhere(undisturbed[0], tmp_path / "home")
    before = judged(home)
    process = twice(home, REFUSED)
    while judged(home) == before and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    _out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    code, result, err = finish(twice(home, REFUSED))
    assert code == 3, err
    assert result["executed"] == SECOND
    assert result["attempts"] == refused_twice[1]["attempts"]
    assert result["digests"] == refused_twice[1]["digests"]


def test_an_accepted_second_attempt_is_registered_with_its_own_recipe_and_lineage(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    home = elsewhere(undisturbed[0], tmp_path / "home")
    written = 'ladder = [{method = "lora", steps = 12, checkpoint_every = 4, batch = 2, rank = 4, decoder_steps = 4, targets = ["attention"]}]\n'
    spoilt = CONFIG.replace("steps = 12", "steps = 1\nlearning_rate = 0.5")                       # not one face is left
    code, result, err = finish(twice(home, written + spoilt + "\n[gate]\nmin_identity_share = 0.0\nmax_copy_share = 1.0\nmax_defect_share = 1.0\n" + UNCOMPARED))
    assert code == 0, err
    assert [a["verdict"] for a in result["attempts"]] == ["retry", "accepted"]
    assert in_mlflow(home) == {"1": "retry", "2": "accepted"}
    assert [r["code"] for r in result["attempts"][0]["reasons"]] == ["faces"]
    assert "entry 1 of `ladder`" in result["attempts"][1]["why"]
    assert result["executed"] == ["train", "sample", "judge", "judge-2", "register"]              # the ladder's recipe is that of `undisturbed`
    assert (result["release"], result["next"]) == ({"model": "likeness.ada", "version": 1}, None)
    expected = undisturbed[1]["digests"]
    assert {k: result["digests"][k] for k in ("recipe", "adapter", "samples")} == {k: expected[k] for k in ("recipe", "adapter", "samples")}
    [registered] = [json.loads(p.read_text()) for p in (home / "store" / "subjects" / "ada" / "stages" / "register").glob("*.json")]
    assert (registered["params"]["recipe"]["steps"], registered["output"]["adapter"]) == (12, expected["adapter"])
    chain = walk(LocalStore(home / "store"), "ada")
    assert chain.ok
    assert {link.stage: link.digest for link in chain.links}["train"] == expected["adapter"]
    assert len(chain.links) == 8                                                                  # nothing of the first attempt


def test_unusable_photos_are_exit_2_and_cost_no_training(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("00.jpg", "01.jpg"):
        (photos / name).write_bytes((PHOTOS / name).read_bytes())
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    code, result, err = run(tmp_path / "home", photos=photos)
    assert code == 2, err
    assert result["verdict"] == "needs_photos"
    assert result["executed"] == ["ingest"]


def test_a_wrong_class_or_subject_is_exit_2_with_a_message(tmp_path: Path) -> None:
    code, result, err = finish(likeness(tmp_path / "home", "run", str(PHOTOS), "--subject", "Ada Lovelace", "--json"))
    assert code == 2
    assert result is None
    assert "id" in err
