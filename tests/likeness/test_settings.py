"""Settings: who wins, what is refused and how it is said, what is hidden."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from likeness.errors import BadSettings
from likeness.recipe import PRIOR_WEIGHTS, RECIPE, Lora, Objective, Pivotal, Recipe, TextualInversion, preset
from likeness.settings import CATEGORIES, GUIDANCE, SHIPPED, S3StoreSettings, Sampling, Settings, default_home, load_settings
from models.maquette.vocabulary import SLOTS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder without a likeness.toml."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def problems(config: Path | None = None, overrides: dict[str, object] | None = None) -> list[str]:
    with pytest.raises(BadSettings) as caught:
        load_settings(config, overrides)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


def source_of(settings: Settings, key: str) -> tuple[str, str]:
    return next((value, source) for name, value, source in settings.explain() if name == key)


# -- who wins

def test_each_layer_wins_over_the_one_before(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_of(load_settings(), "sampling.steps") == ("20", "shipped likeness.toml")
    (elsewhere / "likeness.toml").write_text("[sampling]\nsteps = 21\nbare = 5\n")
    assert source_of(load_settings(), "sampling.steps") == ("21", "likeness.toml")
    named = elsewhere / "mine.toml"
    named.write_text("sampling.steps = 22\n")
    monkeypatch.setenv("LIKENESS_CONFIG", str(named))
    assert source_of(load_settings(), "sampling.steps") == ("22", "mine.toml")
    assert source_of(load_settings(), "sampling.bare") == ("4", "shipped likeness.toml")     # one file, not both
    assert source_of(load_settings(elsewhere / "likeness.toml"), "sampling.steps") == ("21", "likeness.toml")
    monkeypatch.setenv("LIKENESS_SAMPLING__STEPS", "23")
    assert source_of(load_settings(), "sampling.steps") == ("23", "environment LIKENESS_SAMPLING__STEPS")
    settings = load_settings(overrides={"sampling.steps": 24, "sampling.batch": None})
    assert source_of(settings, "sampling.steps") == ("24", "flag")
    assert source_of(settings, "sampling.batch") == ("8", "shipped likeness.toml")
    assert source_of(settings, "gate.min_samples") == ("8", "default in code")


@pytest.mark.parametrize(("name", "text", "key", "value"), [
    ("LIKENESS_RECIPE__LEARNING_RATE", "1e-4", "recipe.learning_rate", 1e-4),
    ("LIKENESS_RECIPE__TARGETS", '["attention"]', "recipe.targets", ["attention"]),
    ("LIKENESS_RECIPE__OBJECTIVE", '{"prior_weight": 0.25}', "recipe.objective.prior_weight", 0.25),
    ("LIKENESS_BATTERY__NAME", "2024", "battery.name", "2024"),
    ("LIKENESS_BASE", "123", "base", "123"),
    ("LIKENESS_BASE", "true", "recipe.base", "true"),
    ("LIKENESS_SAMPLING__STEPS", "", "sampling.steps", 20),
    ("LIKENESS_HOME", "~/faces", "home", str(Path("~/faces"))),
], ids=["number", "list", "table", "a name like a number", "base like a number", "base like a truth", "empty is unset", "home of the user"])
def test_the_environment_is_read_as_it_is_meant(monkeypatch: pytest.MonkeyPatch, name: str, text: str, key: str, value: object) -> None:
    monkeypatch.setenv(name, text)
    found = json.loads(source_of(load_settings(), key)[0])
    assert found == (str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value)


def test_what_kubernetes_sets_for_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR", "MLFLOW_SERVICE_HOST", "MLFLOW_PORT_5000_TCP_PROTO"):
        monkeypatch.setenv(f"LIKENESS_{name}", "tcp://10.0.0.1:80")
    load_settings()


def test_a_port_of_ours_is_no_service_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_UP__MLFLOW_PORT", "5001")
    monkeypatch.setenv("LIKENESS_MLFLOW_PORT", "tcp://10.0.0.1:5000")
    assert load_settings().up.mlflow_port == 5001


def test_the_home_is_the_platforms_data_folder_and_is_not_created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIKENESS_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert load_settings().home == tmp_path / "data" / "likeness"
    assert not (tmp_path / "data").exists()
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_home() == Path.home() / ".local" / "share" / "likeness"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_home() == Path.home() / "Library" / "Application Support" / "likeness"


@pytest.mark.parametrize("number", [0, 11, 1.5])
def test_attempts_have_a_limit(elsewhere: Path, number: float) -> None:
    (elsewhere / "likeness.toml").write_text(f"max_attempts = {number}\n")
    assert problems()[0].startswith(f"max_attempts: found {number}, allowed")
    assert load_settings(overrides={"max_attempts": 3}).max_attempts == 3


def test_a_recipe_without_a_base_is_for_the_one_base(elsewhere: Path) -> None:
    (elsewhere / "likeness.toml").write_text('base = "sd15"\nladder = [{method = "lora", steps = 300}]\n')
    settings = load_settings()
    assert settings.recipe == RECIPE.validate_python(preset("lora", "sd15"), strict=False)
    assert settings.ladder == (settings.recipe.model_copy(update={"steps": 300}),)
    (elsewhere / "likeness.toml").write_text('base = "sd15"\nrecipe.base = "sdxl"\n')
    assert "base is 'sd15', a recipe says 'sdxl'" in problems()[0]


def test_a_base_is_sampled_with_its_own_guidance_unless_another_is_named(elsewhere: Path) -> None:
    assert load_settings().sampling == Sampling()
    for base, scale in GUIDANCE.items():
        assert load_settings(overrides={"base": base}).sampling == Sampling(guidance=scale)
        assert load_settings(overrides={"base": base, "sampling.steps": 30, "sampling.guidance": 1.5}).sampling == Sampling(steps=30, guidance=1.5)
    assert "is 'sd15'" in problems(overrides={"base": "sd15", "recipe.base": "sdxl"})[0]
    (elsewhere / "likeness.toml").write_text('base = "sd15"\nsampling = 3\n')
    assert problems()[0].startswith("sampling")


@pytest.mark.parametrize("recipe", [Lora(), Lora(decoder_steps=7, objective=Objective(prior="dop")), Pivotal(min_rank=2)], ids=["defaults", "others", "more"])
def test_a_recipe_that_is_shown_comes_back_through_settings_as_itself(recipe: Recipe, elsewhere: Path) -> None:
    """Presets fill in what a recipe does not say; what `run --json` offers for `ladder` says everything."""
    assert load_settings(overrides={"ladder": [recipe.whole()]}).ladder == (recipe,)
    assert load_settings(overrides={"recipe": recipe.whole()}).recipe == recipe


def test_a_prior_that_is_named_is_not_named_for_nothing(elsewhere: Path) -> None:
    """The maquette's presets have the weight 0."""
    assert load_settings().recipe.objective == Objective(prior_weight=0.0)
    for prior, weight in PRIOR_WEIGHTS.items():
        assert load_settings(overrides={"recipe.objective.prior": prior}).recipe.objective == Objective(prior=prior, prior_weight=weight)          # type: ignore[arg-type]
    assert load_settings(overrides={"recipe.objective.prior": "dop", "recipe.objective.prior_weight": 0.5}).recipe.objective == Objective(prior="dop", prior_weight=0.5)
    (elsewhere / "likeness.toml").write_text('recipe.method = "textual_inversion"\nrecipe.objective.prior = "dop"\n')
    assert any("prior" in problem for problem in problems())


def test_every_setting_is_explained_at_its_default_too(elsewhere: Path) -> None:
    rows = {key: (value, source) for key, value, source in load_settings(overrides={"recipe.objective.prior": "class_pictures"}).explain()}
    assert rows["recipe.objective.prior"] == ('"class_pictures"', "flag")
    assert rows["gate.max_more_seeds"] == ("2", "default in code")


def test_the_method_chooses_the_preset_and_what_is_named_wins_over_it(elsewhere: Path) -> None:
    (elsewhere / "likeness.toml").write_text('recipe.method = "textual_inversion"\nrecipe.vectors = 2\n')
    assert load_settings().recipe == TextualInversion(vectors=2)
    (elsewhere / "likeness.toml").write_text('base = "sd15"\n[recipe]\nmethod = "pivotal"\nsteps = 7\nobjective.min_snr = 3.0\n')
    found = load_settings().recipe
    assert isinstance(found, Pivotal)
    assert (found.steps, found.batch, found.objective.min_snr, found.objective.prior_weight) == (7, 1, 3.0, 1.0)
    assert found.base == "sd15"
    (elsewhere / "likeness.toml").unlink()
    assert load_settings(overrides={"recipe.method": "dreambooth"}).recipe.method == "dreambooth"


@pytest.mark.parametrize(("lines", "words"), [
    ('recipe.method = "magic"', "recipe.method: found \"magic\", allowed 'dreambooth', 'lora', 'textual_inversion', 'pivotal' (from likeness.toml)"),
    ("ladder = [{rank = 3}]", "ladder[0].method: found nothing, allowed 'dreambooth', "),
    ('recipe.method = "dreambooth"\nrecipe.rank = 3', "recipe.rank: there is no such setting of method 'dreambooth' (from likeness.toml), allowed base, batch, "),
    ("recipe.rnak = 3", "recipe.rnak: there is no such setting of method 'lora' (from likeness.toml); did you mean recipe.rank?"),
    ('recipe.method = "textual_inversion"\nrecipe.objective.prior_weight = 1.0', "recipe.objective.prior_weight: there is no such setting of method 'textual_inversion'"),
    ('recipe.targets = ["text_encoder"]', "recipe.targets: found [\"text_encoder\"], allowed attention, convolution or both"),
], ids=["unknown method", "no method", "of another method", "misspelt", "of another objective", "text tower alone"])
def test_a_recipe_that_cannot_be_is_refused_with_what_is_allowed(elsewhere: Path, lines: str, words: str) -> None:
    (elsewhere / "likeness.toml").write_text(lines + "\n")
    (line,) = problems()
    assert words in line


# -- what is refused

def test_all_problems_are_told_at_once_with_key_value_need_and_place(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "likeness.toml").write_text("""
        home = "relative"
        [sampling]
        stepps = 3
        guidance = "high"
        [backends]
        detect = "magic"
        [smapling]
        steps = 1
        [[battery.prompts]]
        category = "plain"
        [store]
        root = "store"
    """)
    monkeypatch.delenv("LIKENESS_HOME")
    monkeypatch.setenv("LIKENESS_RECIPE__RANK", "0")
    monkeypatch.setenv("LIKENESS_SCHEDULE__TIMEZONE", "Mars/Olympus")
    monkeypatch.setenv("LIKENESS_SCHEDULE__CRON", "nightly")
    assert sorted(problems()) == sorted([
        'home: found "relative", allowed an absolute path (from likeness.toml)',
        "sampling.stepps: there is no such setting (from likeness.toml); did you mean sampling.steps?",
        'sampling.guidance: found "high", allowed a valid number (from likeness.toml)',
        "backends.detect: found \"magic\", allowed 'dlib', 'insightface' or 'facexlib' (from likeness.toml)",
        "smapling: there is no such setting (from likeness.toml); did you mean sampling?",
        "battery.prompts[0].template: found nothing, allowed a value (from likeness.toml)",
        'store.root: found "store", allowed an absolute path (from likeness.toml)',
        "recipe.rank: found 0, allowed greater than or equal to 1 (from environment LIKENESS_RECIPE__RANK)",
        'schedule.timezone: found "Mars/Olympus", allowed an IANA time zone, for example Europe/Zurich (from environment LIKENESS_SCHEDULE__TIMEZONE)',
        next(line for line in problems() if line.startswith('schedule.cron: found "nightly", allowed ')),
    ])


@pytest.mark.parametrize(("prompt", "words"), [
    ({"category": "pets", "template": "a {who}"}, "'pets' is none"),
    ({"category": "plain", "template": "a photo"}, "'a photo' is none"),
    ({"category": "plain", "template": "a {who} and a {who}"}, "once"),
    ({"category": "plain", "template": "a {who} in {place}"}, "no other braces"),
    ({"category": "plain", "template": "a {who!r}"}, "is none"),
    ({"category": "plain", "template": "a {who.__class__}"}, "is none"),
    ({"category": "plain", "template": "a {who"}, "is none"),
    ({"category": "plain", "template": "a {who} {}"}, "is none"),
], ids=["category", "nobody", "twice", "another slot", "conversion", "attribute", "open brace", "empty slot"])
def test_a_prompt_that_cannot_be_sampled_is_refused_here(monkeypatch: pytest.MonkeyPatch, prompt: dict[str, str], words: str) -> None:
    monkeypatch.setenv("LIKENESS_BATTERY__PROMPTS", json.dumps([prompt]))
    (line,) = problems()
    assert line.startswith("battery.prompts: found ")
    assert words in line


@pytest.mark.parametrize(("lines", "words"), [
    ('identity = "facexlib"', "backends.identity: found \"facexlib\", allowed 'dlib' or 'insightface'"),
    ('mask = "dlib"', "backends.mask: found \"dlib\", allowed 'ellipse' or 'facexlib'"),
    ('detect = "insightface"', "backends.insightface: found {}, allowed a folder, because detect = 'insightface'"),
    ('mask = "facexlib"', "backends.facexlib: found {}, allowed a folder, because mask = 'facexlib'"),
    ('second_identity = "dlib"', "backends.second_identity: found \"dlib\", allowed another recogniser than `identity`, which is 'dlib' already"),
    ('second_identity = "insightface"', "backends.insightface: found {}, allowed a folder, because second_identity = 'insightface'"),
    ('facexlib.folder = "weights"', 'backends.facexlib.folder: found "weights", allowed an absolute path'),
    ('facexlib.sha256 = { "a.pth" = "abc" }', 'backends.facexlib.sha256.a.pth: found "abc", allowed'),
    ('insightface.sha256 = { "../a.onnx" = "' + "0" * 64 + '" }', "'../a.onnx' is none"),
    ('captions = "blip"', "backends.captions_hub: found null, allowed owner/name@commit, or captions_folder, because captions = 'blip'"),
    ('captions_hub = "somebody/blip@main"', 'backends.captions_hub: found "somebody/blip@main", allowed match pattern'),
    ('captions_folder = "blip"', 'backends.captions_folder: found "blip", allowed an absolute path'),
    ("insightface.same_person_cosine = 1.0", "backends.insightface.same_person_cosine: found 1.0, allowed less than 1"),
], ids=["no such recogniser", "no such mask", "detector without folder", "mask without folder", "the same recogniser twice", "second recogniser without folder", "relative folder",
        "no sha256", "a path", "captioner without folder", "a branch", "relative captioner", "cosine of a twin"])
def test_a_backend_that_cannot_be_is_refused_with_what_is_allowed(elsewhere: Path, lines: str, words: str) -> None:
    (elsewhere / "likeness.toml").write_text(f"[backends]\n{lines}\n")
    (line,) = problems()
    assert words in line


@pytest.mark.parametrize(("lines", "words"), [
    ('kind = "ftp"', "store.kind: found \"ftp\", allowed 'local', 's3' (from likeness.toml)"),
    ('kind = "s3"', "store.bucket: found nothing, allowed a value"),
    ('bucket = "photos"', "store.bucket: not a setting of this kind (from likeness.toml)"),
    ('kind = "s3"\nbucket = "photos"\nroot = "/srv"', "store.root: not a setting of this kind (from likeness.toml)"),
    ('kind = "s3"\nbucket = "photos"\nbukket = "x"', "store.bukket: there is no such setting (from likeness.toml); did you mean store.bucket?"),
    ('kind = "s3"\nbucket = "Photos"', 'store.bucket: found "Photos", allowed match pattern'),
    ('kind = "s3"\nbucket = "photos"\nprefix = "ada"', 'store.prefix: found "ada", allowed nothing, or segments of'),
    ('kind = "s3"\nbucket = "photos"\nprefix = "a//"', 'store.prefix: found "a//", allowed'),
    ('kind = "s3"\nbucket = "photos"\nmultipart_mib = 4', "store.multipart_mib: found 4, allowed greater than or equal to 5"),
    ('kind = "s3"\nbucket = "photos"\nencryption = "none"', "store.encryption: found \"none\", allowed 'AES256', 'aws:kms' or 'aws:kms:dsse'"),
    ('kind = "s3"\nbucket = "photos"\nencryption = "AES256"\nkms_key_id = "k"', 'store.kms_key_id: found "k", allowed a key only with encryption'),
    ('kind = "s3"\nbucket = "photos"\npatience_s = 60', "claims: found"),
    ('kind = "s3"\nbucket = "photos"\npatience_s = 60', "allowed a ttl_s of at least 84, because store.patience_s + store.timeout_s is 70"),
], ids=["no such kind", "no bucket", "bucket of a folder", "folder of a bucket", "a slip", "bucket in capitals", "no folder", "empty segment", "small parts",
        "no encryption", "key of nothing", "more patience than a claim has", "how long a claim must last"])
def test_a_store_that_cannot_be_is_refused_with_what_is_allowed(elsewhere: Path, lines: str, words: str) -> None:
    (elsewhere / "likeness.toml").write_text(f"[store]\n{lines}\n")
    (line,) = problems()
    assert words in line


@pytest.mark.parametrize("address", ["minio:9000", "ftp://minio", "https://me:hunter2@minio", "https://minio/?X-Amz-Signature=hunter2", "https://", "http://minio:port"])
def test_an_address_of_a_store_is_only_an_address_and_what_was_found_is_not_shown(elsewhere: Path, address: str) -> None:
    (elsewhere / "likeness.toml").write_text(f'store = {{ kind = "s3", bucket = "photos", endpoint_url = "{address}" }}\n')
    (line,) = problems()
    assert line.startswith("store.endpoint_url: found a value that is not shown, allowed http:// or https:// and a host, without user, password or query")
    assert "hunter2" not in line


def test_all_problems_of_a_bucket_are_told_at_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "likeness.toml").write_text('store = { kind = "s3", prefix = "/", timeout_s = 0, addressing = "ip" }\n')
    monkeypatch.setenv("LIKENESS_STORE__REGION", "Zurich")
    assert sorted(line.split(":")[0] for line in problems()) == ["store.addressing", "store.bucket", "store.prefix", "store.region", "store.timeout_s"]


def test_a_bucket_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_STORE__KIND", "s3")
    monkeypatch.setenv("LIKENESS_STORE__BUCKET", "123")
    monkeypatch.setenv("LIKENESS_STORE__PREFIX", "team-a/")
    assert load_settings().store == S3StoreSettings(bucket="123", prefix="team-a/")


def test_backends_are_chosen_independently(elsewhere: Path) -> None:
    (elsewhere / "likeness.toml").write_text('[backends]\ndetect = "facexlib"\nidentity = "insightface"\nfacexlib.folder = "/f"\ninsightface.folder = "/i"\n')
    chosen = load_settings().backends
    assert (chosen.detect, chosen.identity, chosen.mask, chosen.facexlib.folder) == ("facexlib", "insightface", "ellipse", Path("/f"))


@pytest.mark.parametrize("content", [b"[sampling\n", b"\xff\xfe"], ids=["no TOML", "no text"])
def test_a_file_that_is_no_toml_is_named(elsewhere: Path, content: bytes) -> None:
    (elsewhere / "likeness.toml").write_bytes(content)
    with pytest.raises(BadSettings, match=r"likeness\.toml is not TOML"):
        load_settings()


def test_a_named_file_must_be_there(elsewhere: Path) -> None:
    with pytest.raises(BadSettings, match=r"'gone\.toml' is not there"):
        load_settings(elsewhere / "gone.toml")


def test_where_settings_came_from_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_SOURCES__HOME", "flag")
    assert "sources: there is no such setting" in problems()[0]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().home = Path("/")      # type: ignore[misc]


# -- what is hidden

def test_no_secret_is_shown(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_REGISTRY__TRACKING_URI", "postgresql://likeness:hunter2@db/mlflow")
    monkeypatch.setenv("LIKENESS_REGISTRY__ARTIFACT_ROOT", "https://likeness:hunter2@host/artifacts")
    settings = load_settings()
    assert "hunter2" not in repr(settings.registry.tracking_uri)
    shown = json.dumps(settings.explain())
    assert "hunter2" not in shown
    assert "https://likeness:***@host/artifacts" in shown
    assert settings.registry.tracking_uri is not None
    assert "hunter2" in settings.registry.tracking_uri.get_secret_value()
    monkeypatch.delenv("LIKENESS_REGISTRY__TRACKING_URI")
    (elsewhere / "likeness.toml").write_text('registry.tracking_uri = ["hunter2"]\n')
    monkeypatch.setenv("LIKENESS_SAMPLING__STEPS", "ftp://me:hunter2@host")
    assert len(problems()) == 2
    assert "hunter2" not in "".join(problems())


# -- what is shipped

def test_everything_is_explained_once() -> None:
    keys = [key for key, _, _ in load_settings().explain()]
    assert len(keys) == len(set(keys))
    assert {key.split(".")[0] for key in keys} == set(Settings.model_fields)


def test_the_shipped_file_names_every_section() -> None:
    assert set(Settings.model_fields) - set(tomllib.loads(SHIPPED.read_text())) <= {"home", "base_folder"}


def test_the_shipped_values_are_the_defaults_in_code() -> None:
    settings = load_settings()
    for name in ("backends", "store", "registry", "claims", "schedule", "sampling", "intake", "gate", "recipe"):
        assert getattr(settings, name) == Settings.model_fields[name].default, name


def test_the_shipped_battery_covers_every_category_and_asks_for_what_can_be_measured() -> None:
    battery = load_settings().battery
    assert {p.category for p in battery.prompts} == set(CATEGORIES)
    assert len({p.template for p in battery.prompts}) == len(battery.prompts) >= 8
    for prompt in battery.prompts:
        assert all(value in SLOTS[slot].phrases for slot, value in prompt.slots.items())
        assert prompt.category == "plain" or prompt.slots


def test_the_commented_examples_in_the_shipped_file_are_settings(elsewhere: Path) -> None:
    text = re.sub(r"^# (\w+ = .*)$", r"\1", re.sub(r"^(base|ladder) = .*$", "", SHIPPED.read_text(), flags=re.M), flags=re.M)
    assert "\nhome = " in text
    (elsewhere / "likeness.toml").write_text(text)
    assert load_settings().registry.artifact_root == "s3://bucket/mlflow"


def test_the_defaults_of_a_bucket_in_the_shipped_file_are_those_in_code(elsewhere: Path) -> None:
    lines = re.findall(r"^#   (\w+ = .*)$", SHIPPED.read_text(), flags=re.M)
    assert [line.split(" ")[0] for line in lines] == list(S3StoreSettings.model_fields)
    (elsewhere / "likeness.toml").write_text("[store]\n" + "\n".join(lines))
    assert isinstance(load_settings().store, S3StoreSettings)                  # the examples can be
    (elsewhere / "likeness.toml").write_text("[store]\n" + "\n".join(line for line in lines if "no default" not in line))
    assert load_settings().store == S3StoreSettings(bucket="likeness")


def test_the_core_imports_neither_network_nor_scheduler(root: Path) -> None:
    program = ("import sys, likeness.once, likeness.settings, likeness.stages, likeness.store; likeness.settings.load_settings();"
               "print(sorted({'torch', 'prefect', 'mlflow', 'boto3', 'numpy', 'diffusers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout == "[]\n"
