"""MLflow as a projection: exactly one version per Release, whoever dies and however many ask; the whole lineage from the version alone."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from likeness.attempt_registry import KEY, Attempts, show_attempts
from likeness.dossier import describe, flatten
from likeness.errors import BadSettings, IntegrityError, RecipeError, ServerUnreachable, SubjectForgotten
from likeness.ladder import Attempt
from likeness.night import Night
from likeness.night_registry import show_night
from likeness.recipe import Lora
from likeness.records import Curve, CurvePoint, Reason, Release, Verdict
from likeness.registry import ALIAS, Registry
from likeness.store import LocalStore, MemoryStore
from likeness.version import code_version
from tests.likeness.fabricated import BASE, World, build, register_once

CURVE = Curve(points=(CurvePoint(step=10, identity=0.25, obedience=None, samples=8), CurvePoint(step=20, identity=0.5, obedience=0.75, samples=8)), chosen=20)


class Died(BaseException):
    """The process ends here; a BaseException, so that no handler takes it for an error."""


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: making them takes 8 seconds, copying them none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    registry = Registry(f"sqlite:///{path}", path.parent / "artifacts")
    registry.client.search_experiments()
    return path


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "registry.db")
    return f"sqlite:///{tmp_path}/registry.db"


@pytest.fixture
def registry(uri: str, tmp_path: Path) -> Registry:
    return Registry(uri, tmp_path / "artifacts")


@pytest.fixture
def world() -> World:
    return build(MemoryStore(), curve=CURVE)


def versions(registry: Registry, name: str = "likeness.ada") -> list[int]:
    return sorted(int(v.version) for v in registry.client.search_model_versions(f"name = '{name}'"))


def contents(registry: Registry) -> tuple[int, int, list[int], int]:
    """Runs, logged models, versions, and the version under the alias."""
    experiment = registry.client.get_experiment_by_name("likeness/maquette")
    assert experiment is not None
    champion = registry.client.get_model_version_by_alias("likeness.ada", ALIAS)
    return (len(registry.client.search_runs([experiment.experiment_id])), len(registry.client.search_logged_models([experiment.experiment_id])),
            versions(registry), int(champion.version))


def test_a_release_shows_everything_from_the_version_alone(registry: Registry, world: World, uri: str, tmp_path: Path) -> None:
    release = registry.register(world.dossier())
    assert (release.model, release.version, release.adapter, release.verdict) == ("likeness.ada", 1, world.adapter.digest, world.verdict.digest)

    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("likeness.ada", ALIAS)
    run = client.get_run(version.run_id)
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert run.info.status == "FINISHED"
    assert str(model.status) == "READY"
    assert [o.model_id for o in run.outputs.model_outputs] == [model.model_id]

    photos = [p.sha256 for p in world.intake.photos]
    inputs = [{t.key: t.value for t in i.tags} for i in run.inputs.dataset_inputs]
    assert sorted(i["sha256"] for i in inputs if i["kind"] == "photo") == sorted(photos)
    assert [i["sha256"] for i in inputs if i["kind"] == "training_set"] == [world.training_set.digest]
    for tags in (version.tags, run.data.tags, model.tags):
        assert tags["likeness.subject"] == "ada"
        assert tags["likeness.photos"].split(",") == photos
        assert tags["likeness.photo_sources"].split(",") == [p.source_sha256 for p in world.intake.photos]
        assert tags["likeness.portraits"].split(",") == [p.digest for p in world.training_set.portraits]
        assert tags["likeness.held_out"].split(",") == [p.digest for p in world.training_set.held_out]
        assert tags["likeness.captions"].split(",") == [c.digest for c in world.training_set.captions]
        assert dict(item.split("=") for item in tags["likeness.base_files"].split(",")) == BASE.files
        found = {k: tags[f"likeness.{k}"] for k in ("training_set", "recipe", "base", "adapter", "samples", "verdict", "weights", "code")}
        assert found == {"training_set": world.training_set.digest, "recipe": world.recipe.digest, "base": BASE.digest, "adapter": world.adapter.digest,
                         "samples": world.samples.digest, "verdict": world.verdict.digest, "weights": world.adapter.weights.sha256,
                         "code": "0.1.0+g" + "c" * 40}
        for name, stage in world.published.items():
            assert tags[f"likeness.stage.{name}"] == f"{stage.key}:{stage.digest}"

    assert run.data.params["objective.min_snr"] == "5.0"
    assert run.data.metrics["score.identity"] == 0.8
    assert "score.copies" not in run.data.metrics
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.5), (20, 0.25)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "choice.identity")] == [(10, 0.25), (20, 0.5)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "choice.obedience")] == [(20, 0.75)]
    files = {f.path for f in client.list_logged_model_artifacts(model.model_id)}
    assert files == {"adapter.safetensors", "recipe.json", "verdict.json", "base.json", "lineage.json", "report.html", "samples.png"}
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == files - {"adapter.safetensors"}
    weights = next((tmp_path / "artifacts").rglob("adapter.safetensors"))
    assert weights.read_bytes() == world.weights
    assert not list((tmp_path / "artifacts" / ".scratch").iterdir())


def test_registering_twice_changes_nothing(registry: Registry, world: World) -> None:
    first = registry.register(world.dossier())
    steps: list[str] = []
    again = Registry(registry.tracking_uri, registry.artifact_root, on_step=steps.append)
    assert again.register(world.dossier(report_html="another one", seconds={}, code="0.2.0")) == first
    assert steps == []
    assert contents(registry) == (1, 1, [1], 1)
    assert registry.find("ada", world.adapter.digest) == registry.champion("ada") == first
    assert registry.champion("nobody") is None


def test_dying_after_each_call_leaves_one_of_each(empty_database: Path, tmp_path: Path, world: World) -> None:
    steps: list[str] = []
    shutil.copy(empty_database, tmp_path / "whole.db")
    Registry(f"sqlite:///{tmp_path}/whole.db", tmp_path / "whole", on_step=steps.append).register(world.dossier())
    assert {"experiment", "run", "model", "model ready", "registered model", "version", "run finished", "alias"} <= set(steps)
    for nth in range(1, len(steps) + 1):
        shutil.copy(empty_database, tmp_path / f"{nth}.db")
        uri, artifacts = f"sqlite:///{tmp_path}/{nth}.db", tmp_path / f"artifacts-{nth}"
        with pytest.raises(Died):
            Registry(uri, artifacts, on_step=dying_at(nth)).register(world.dossier())
        registry = Registry(uri, artifacts)
        assert registry.register(world.dossier()).version == 1, steps[nth - 1]
        assert contents(registry) == (1, 1, [1], 1), steps[nth - 1]
        run = registry.client.get_run(registry.client.get_model_version("likeness.ada", "1").run_id)
        assert run.info.status == "FINISHED"
        assert [(m.step, m.value) for m in registry.client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.5), (20, 0.25)], steps[nth - 1]
        assert len(run.inputs.dataset_inputs) == 4
        assert len(run.outputs.model_outputs) == 1


def dying_at(nth: int) -> Callable[[str], None]:
    count = 0

    def on_step(_: str) -> None:
        nonlocal count
        count += 1
        if count == nth:
            raise Died
    return on_step


def test_a_claim_left_by_a_dead_attempt_is_taken_over(uri: str, tmp_path: Path) -> None:
    world = build(LocalStore(tmp_path / "store"))
    with pytest.raises(Died):
        register_once(world, Registry(uri, tmp_path / "artifacts", on_step=dying_at(9)))
    registry = Registry(uri, tmp_path / "artifacts")
    assert register_once(world, registry).version == 1
    assert contents(registry) == (1, 1, [1], 1)


def test_two_processes_at_once_make_one_version(uri: str, tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "tests.likeness.fabricated", str(tmp_path / "store"), uri, str(tmp_path / "artifacts")]
    children = [subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ.copy()) for _ in range(2)]
    try:
        assert [child.stdout.readline().strip() for child in children if child.stdout] == ["ready", "ready"]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        said = [ast.literal_eval(child.communicate(timeout=60)[0].strip()) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert said[0] == said[1]
    assert contents(Registry(uri, tmp_path / "artifacts")) == (1, 1, [1], 1)


def test_copies_made_without_a_claim_converge_to_the_lowest_version(registry: Registry, world: World) -> None:
    """What search-then-create leaves when two write at once: two runs, two models, two versions of one adapter."""
    registry.register(world.dossier())
    client, tags = registry.client, describe(world.dossier())
    first = client.get_model_version("likeness.ada", "1")
    experiment = client.get_run(first.run_id).info.experiment_id
    run = client.create_run(experiment, tags=tags)
    model = client.create_logged_model(experiment, source_run_id=run.info.run_id, tags=tags)
    client.log_text(run.info.run_id, "personal", "report.html")
    client.create_model_version("likeness.ada", f"models:/{model.model_id}", run.info.run_id, tags={**tags, "likeness.model_id": model.model_id})
    client.set_registered_model_alias("likeness.ada", ALIAS, "2")
    stale = Registry(registry.tracking_uri, registry.artifact_root).register(world.dossier())
    assert stale.version == 1
    assert contents(registry) == (1, 1, [1], 1)
    assert client.get_run(first.run_id).info.lifecycle_stage == "active"
    assert "personal" not in [p.read_text(errors="replace") for p in Path(str(registry.artifact_root)).rglob("report.html")]


def test_other_recipes_are_other_releases_and_the_newest_is_champion(registry: Registry) -> None:
    store = MemoryStore()
    worlds = [build(store, subject="ada", recipe=Lora(seed=i), weights=f"weights {i}".encode()) if i == 0
              else build(MemoryStore(), subject="ada", recipe=Lora(seed=i), weights=f"weights {i}".encode()) for i in range(2)]
    assert [registry.register(w.dossier()).version for w in worlds] == [1, 2]
    assert registry.register(worlds[0].dossier()).version == 1
    champion = registry.champion("ada")
    assert champion is not None
    assert champion.version == 2                     # registering the old one again does not move the alias back
    assert "likeness.superseded_by" not in registry.client.get_model_version("likeness.ada", "1").tags


def test_new_weights_of_the_same_recipe_supersede_the_old_ones(registry: Registry) -> None:
    old, new = build(MemoryStore(), weights=b"old"), build(MemoryStore(), weights=b"new")
    assert old.dossier().register_key == new.dossier().register_key
    assert [registry.register(w.dossier()).version for w in (old, new)] == [1, 2]
    assert registry.client.get_model_version("likeness.ada", "1").tags["likeness.superseded_by"] == "2"


def test_a_new_verdict_on_the_same_adapter_updates_its_version(registry: Registry) -> None:
    old, new = build(MemoryStore(), policy="1" * 64), build(MemoryStore(), policy="2" * 64)
    registry.register(old.dossier())
    release = registry.register(new.dossier())
    assert (release.version, release.verdict) == (1, new.verdict.digest)
    assert contents(registry) == (1, 1, [1], 1)
    assert registry.client.get_model_version("likeness.ada", "1").tags["likeness.policy"] == "2" * 64


def test_a_lost_claim_stops_before_the_next_effect(registry: Registry, world: World) -> None:
    with pytest.raises(Died):
        registry.register(world.dossier(), check=dying_check(6))
    assert not registry.client.search_model_versions("name = 'likeness.ada'")


def dying_check(nth: int) -> Callable[[], None]:
    step = dying_at(nth)
    return lambda: step("")


def test_what_does_not_belong_together_is_not_registered(registry: Registry, world: World) -> None:
    with pytest.raises(IntegrityError, match="the weights"):
        registry.register(world.dossier(weights=b"other"))
    with pytest.raises(IntegrityError, match="the adapter's recipe"):
        registry.register(world.dossier(recipe=Lora(seed=5)))
    with pytest.raises(RecipeError, match="rejected"):
        registry.register(world.dossier(verdict=world.verdict.model_copy(update={"kind": "rejected"})))


@pytest.mark.parametrize(("uri", "artifacts"), [
    ("sqlite:///mlflow.db", "s3://bucket"), ("sqlite:////x/mlflow.db", None), ("mlruns", "s3://bucket"), ("sqlite:////x/mlflow.db", Path("here")),
    ("sqlite:////x/mlflow.db", "here"),
], ids=["relative database", "no artifact root", "a folder", "relative artifacts", "relative artifacts in words"])
def test_the_current_folder_is_never_used(uri: str, artifacts: Path | str | None) -> None:
    with pytest.raises(BadSettings, match="registry"):
        Registry(uri, artifacts)


def test_a_dead_server_is_a_transient_error_without_its_address(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServerUnreachable) as caught:
        Registry("http://user:secret@127.0.0.1:9").register(world.dossier())
    assert "secret" not in caught.value.message


def test_many_photos_fit_into_tags() -> None:
    tags = describe(build(MemoryStore(), photos=230).dossier())
    assert all(len(value) <= 8000 for value in tags.values())
    assert [len(tags[f"likeness.photos{part}"].split(",")) for part in ("", ".1", ".2")] == [100, 100, 30]


def test_the_code_version_names_the_commit_and_no_path(root: Path) -> None:
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert f"g{commit}" in code_version() if commit else "+" not in code_version()
    assert "/" not in code_version()


def test_flatten_keeps_every_number() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {"a.b": 1, "a.c.d": "1,2", "e": None}


def test_importing_the_registry_imports_neither_mlflow_nor_torch(root: Path) -> None:
    code = "import json, sys, likeness.registry; print(json.dumps([m for m in ('mlflow', 'torch', 'prefect') if m in sys.modules]))"
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == []


# -- the ladder: every attempt a run of its own, nested

def tried(world: World, *, release: Release | None = None) -> Attempts:
    """Two refused attempts, and the accepted one if there is a release."""
    refused = [Attempt(Lora(steps=200 * n), Verdict(kind="retry", reasons=(Reason(code="identity", message=f"{n} in ten"),), scores={"identity_share": 0.1 * n, "spread": None},
                                                    measured="f" * 64, policy="d" * 64), why=f"because {n}") for n in (1, 2)]
    accepted = [Attempt(world.recipe, world.verdict, why="more rank")] if release else []
    return Attempts(world.subject, BASE, world.training_set.digest, [*refused, *accepted], ["1" * 64, "2" * 64, *([world.adapter.digest] if release else [])], release)


def nested(registry: Registry) -> dict[str, dict[str, str]]:
    """Tags of every run by run id."""
    experiment = registry.client.get_experiment_by_name("likeness/maquette")
    assert experiment is not None
    return {run.info.run_id: dict(run.data.tags) for run in registry.client.search_runs([experiment.experiment_id])}


def test_refused_attempts_are_nested_runs_with_recipe_scores_and_why(registry: Registry, world: World) -> None:
    above = show_attempts(registry, tried(world))
    runs = nested(registry)
    assert len(runs) == 3
    below = {tags["likeness.attempt"]: run for run, tags in runs.items() if tags.get("mlflow.parentRunId") == above}
    assert sorted(below) == ["1", "2"]
    assert "mlflow.parentRunId" not in runs[above]
    assert (runs[above]["likeness.verdict_kind"], runs[above]["likeness.counts"]) == ("retry", "2")
    run = registry.client.get_run(below["2"])
    assert (run.data.params["steps"], run.data.metrics) == ("400", {"score.identity_share": 0.2})
    assert (run.info.status, run.data.tags["likeness.why"], run.data.tags["likeness.reasons"]) == ("FINISHED", "because 2", "2 in ten")
    assert show_attempts(registry, tried(world)) == above
    assert nested(registry) == runs


def test_after_an_accepted_attempt_the_release_stands_among_them(registry: Registry, world: World) -> None:
    above = show_attempts(registry, tried(world))                    # one night refuses, the next one tries once more
    release = registry.register(world.dossier())
    assert show_attempts(registry, tried(world, release=release)) == above
    runs = nested(registry)
    assert len(runs) == 4
    below = {tags["likeness.attempt"]: run for run, tags in runs.items() if tags.get("mlflow.parentRunId") == above}
    assert below["3"] == registry.client.get_model_version(release.model, str(release.version)).run_id
    assert (runs[above]["likeness.verdict_kind"], runs[above]["likeness.counts"]) == ("accepted", "3")
    assert registry.register(world.dossier()) == release             # and registering again leaves it there
    assert nested(registry) == runs


def test_dying_while_attempts_are_shown_and_two_at_once_leave_one_run_of_each(registry: Registry, world: World) -> None:
    steps = 0
    while True:
        def die(name: str, *, after: int = steps) -> None:
            nonlocal count
            count += 1
            if count > after:
                raise Died

        count, registry._on_step = 0, die
        try:
            above = show_attempts(registry, tried(world))
            break
        except Died:
            steps += 1
    assert steps >= 3
    registry._on_step = None
    twin = registry.client.create_run(registry.client.get_run(above).info.experiment_id, tags={KEY: tried(world).key, "likeness.subject": "ada"})
    assert show_attempts(registry, tried(world)) == above
    runs = nested(registry)
    assert len(runs) == 3 and twin.info.run_id not in runs


@pytest.mark.parametrize("after", range(7))
def test_attempts_of_a_subject_that_is_forgotten_meanwhile_leave_nothing(registry: Registry, world: World, after: int) -> None:
    steps: list[str] = []
    registry._on_step = steps.append

    def check() -> None:
        if len(steps) > after:
            raise SubjectForgotten("ada is forgotten")

    with pytest.raises(SubjectForgotten):
        show_attempts(registry, tried(world), check=check)
    assert nested(registry) == {}
    with sqlite3.connect(registry.tracking_uri.removeprefix("sqlite:///")) as db:
        assert db.execute("select count(*) from runs").fetchone() == db.execute("select count(*) from tags").fetchone() == (0,)


def test_a_night_is_one_run_with_its_numbers_and_its_page_however_often_it_is_joined(registry: Registry) -> None:
    first = Night(night="2026-11-26", counts={"accepted": 1, "failed": 2}, seconds={"train": 3.5}, ok=False, reasons={"server_unreachable": 2}, took_s=9.0)
    run = show_night(registry, first, "<p>first</p>")
    assert show_night(registry, first.model_copy(update={"counts": {"accepted": 3, "failed": 0}, "ok": True}), "<p>joined</p>") == run
    assert show_night(registry, first.model_copy(update={"night": "2026-11-27"}), "<p>next</p>") != run
    shown = registry.client.get_run(run)
    assert shown.data.metrics == {"subjects.accepted": 3.0, "subjects.failed": 0.0, "seconds.train": 3.5, "reasons.server_unreachable": 2.0, "ok": 1.0, "took_s": 9.0}
    assert (shown.info.run_name, shown.info.status) == ("night 2026-11-26", "FINISHED")
    assert registry.client.get_experiment(shown.info.experiment_id).name == "likeness.nights"
    assert isinstance(registry.artifact_root, Path)
    assert sorted(p.read_text() for p in (registry.artifact_root / "nights").rglob("night.html")) == ["<p>joined</p>", "<p>next</p>"]


def test_a_night_in_a_server_that_is_gone_is_a_transient_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServerUnreachable, match="showing the night"):
        show_night(Registry("http://127.0.0.1:9"), Night(night="n1", counts={}, seconds={}, ok=True), "")
