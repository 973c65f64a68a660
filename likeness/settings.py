"""Settings: everything that is declared, read once, at the edge.

    shipped likeness.toml  <  ./likeness.toml, or --config, or LIKENESS_CONFIG  <  environment LIKENESS_SECTION__KEY  <  overrides (flags)

All problems are reported at once, each with its key, what was found, what is allowed and where it was written. Reading settings creates
nothing on disk.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import string
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator

from likeness.digest import Digest
from likeness.errors import BadSettings
from likeness.gate import GatePolicy
from likeness.intake.policy import IntakePolicy
from likeness.ladder import MOST
from likeness.once import ClaimPolicy
from likeness.recipe import METHODS, PRIOR_WEIGHTS, RECIPE, Recipe, preset
from likeness.records import BatteryPrompt, Record, every_field
from likeness.store import is_key

SHIPPED = Path(__file__).with_name("likeness.toml")
PREFIX = "LIKENESS_"
NOT_SETTINGS = {"LIKENESS_CONFIG", "LIKENESS_REQUIRE_ALL"}
# Kubernetes sets these in every pod beside a Service named "likeness" or "likeness-...": nobody chose them. A setting
# has two underscores where a section ends, such as LIKENESS_UP__MLFLOW_PORT.
_KUBERNETES = re.compile(r"(?!.*__)LIKENESS_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
POOL = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
CATEGORIES = ("plain", "expression", "clothes", "place", "style", "accessories")


class Battery(Record):
    """The fixed prompts on which every adapter is sampled."""

    name: str
    seeds: int = Field(2, ge=1, le=64, description="pictures of each prompt")
    prompts: tuple[BatteryPrompt, ...]

    def every(self) -> list[tuple[BatteryPrompt, int]]:
        """(prompt, seed) of every sample, in order."""
        return [(prompt, seed) for prompt in self.prompts for seed in range(self.seeds)]

    @field_validator("prompts")
    @classmethod
    def _usable(cls, prompts: tuple[BatteryPrompt, ...]) -> tuple[BatteryPrompt, ...]:
        if not prompts:
            raise ValueError("at least one prompt")
        for prompt in prompts:
            if prompt.category not in CATEGORIES:
                raise ValueError(f"categories {', '.join(CATEGORIES)}; {prompt.category!r} is none")
            try:
                names = [name for _, name, form, conversion in string.Formatter().parse(prompt.template) if name is not None or form or conversion]
            except ValueError:
                names = []
            if names != ["who"] or "{who}" not in prompt.template:
                raise ValueError(f"templates with {{who}} once and no other braces; {prompt.template!r} is none")
        return prompts


GUIDANCE: Mapping[str, float] = {"maquette": 3.0, "sd15": 7.0, "sdxl": 5.0}      # of each base: docs/bases.md


class Sampling(Record):
    """How samples are drawn."""

    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(GUIDANCE["maquette"], ge=0, le=50, description="classifier-free guidance; what is not said is the base's own: "
                            + ", ".join(f"{base} {scale:g}" for base, scale in GUIDANCE.items()))
    batch: int = Field(8, ge=1, le=256)
    bare: int = Field(4, ge=2, le=64, description="pictures of the class noun alone, drawn with the adapter: they show whether every man has become this man")


class Section(BaseModel):
    """A part of the settings that is not content: places and addresses, never digested."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LocalWeights(Section):
    """Weights in a folder of yours. Every file is checked by its sha256 before a loader opens it; nothing is downloaded."""

    folder: Path | None = Field(None, description="absolute; where the files lie")
    sha256: dict[str, Digest] = Field({}, description="file name to sha256, for files that Likeness's own catalogue does not know")

    @field_validator("folder")
    @classmethod
    def _anywhere(cls, value: Path | None) -> Path | None:
        return value if value is None else _absolute(value)

    @field_validator("sha256")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        if odd := [name for name in value if Path(name).name != name]:
            raise ValueError(f"names of files in the folder, without a path; {odd[0]!r} is none")
        return value


class InsightfaceWeights(LocalWeights):
    """A model pack of insightface: one detector and one recogniser, as .onnx files. The published packs are for non-commercial research only."""

    same_person_cosine: float | None = Field(None, gt=-1, lt=1, description="cosine from which on two photos show one person, for a recogniser that "
                                             "Likeness has not measured: `make bench-faces` measures it")


class Backends(Section):
    """Which network does what."""

    detect: Literal["dlib", "insightface", "facexlib"] = Field("dlib", description="finds faces and their five points")
    identity: Literal["dlib", "insightface"] = Field("dlib", description="recognises people")
    mask: Literal["ellipse", "facexlib"] = Field("ellipse", description="says which pixels of a portrait are face")
    second_identity: Literal["dlib", "insightface"] | None = Field(None, description="a second recogniser, which votes in the gate: a sample is the person if both say so")
    captions: Literal["slots", "blip", "florence"] = Field("slots", description="says what portraits show: docs/captions.md")
    captions_folder: Path | None = Field(None, description="absolute; where the network of blip or florence lies, with safetensors")
    captions_hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+@[0-9a-f]{40}$", validate_default=True, description="instead of a folder: owner/name@commit, the whole "
                                     "commit, downloaded once from the Hugging Face Hub to captioners/ below home")
    insightface: InsightfaceWeights = Field(InsightfaceWeights(), validate_default=True)
    facexlib: LocalWeights = Field(LocalWeights(), validate_default=True)

    @field_validator("captions_folder")
    @classmethod
    def _anywhere(cls, value: Path | None) -> Path | None:
        return value if value is None else _absolute(value)

    @field_validator("captions_hub")
    @classmethod
    def _captioner_lies_somewhere(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("captions") in ("blip", "florence") and info.data.get("captions_folder", value) is None:
            raise ValueError(f"owner/name@commit, or captions_folder, because captions = {info.data['captions']!r}: name where its network lies")
        return value

    @field_validator("second_identity")
    @classmethod
    def _another(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value == info.data.get("identity"):
            raise ValueError(f"another recogniser than `identity`, which is {value!r} already")
        return value

    @field_validator("insightface", "facexlib")
    @classmethod
    def _weights_are_named(cls, value: LocalWeights, info: ValidationInfo) -> LocalWeights:
        for role in ("detect", "identity", "mask", "second_identity"):
            if value.folder is None and info.data.get(role) == info.field_name:
                raise ValueError(f"a folder, because {role} = {info.field_name!r}: name the one in which its weights lie; nothing is downloaded")
        return value


class LocalStoreSettings(Section):
    """A folder."""

    kind: Literal["local"] = "local"
    root: Path | None = Field(None, description="absolute; default: store/ below home")

    @field_validator("root")
    @classmethod
    def _anywhere(cls, value: Path | None) -> Path | None:
        return value if value is None else _absolute(value)


class S3StoreSettings(Section):
    """A bucket of Amazon S3, or of a server that honours If-None-Match and If-Match on writes. Credentials come from boto3's own chain."""

    kind: Literal["s3"] = "s3"
    bucket: str = Field(min_length=3, max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$", description="it must exist")
    prefix: str = Field("", max_length=256, description="folder within the bucket, ending with '/'; several stores may share a bucket")
    region: str | None = Field(None, pattern=r"^[a-z0-9-]+$", description="default: what boto3's own chain says")
    endpoint_url: str | None = Field(None, description="of another server than Amazon's, without a password: https://minio.internal:9000")
    addressing: Literal["auto", "path", "virtual"] = Field("auto", description="path: https://host/bucket/key, which many other servers want")
    encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(None, description="asked of the server for every object; default: what the bucket does")
    kms_key_id: str | None = Field(None, min_length=1, description="with encryption = aws:kms or aws:kms:dsse")
    multipart_mib: int = Field(64, ge=5, le=5120, description="MiB; larger objects are sent in parts of this size, each with its own checksum")
    timeout_s: float = Field(10.0, gt=0, le=600, description="the server's silence for so long is a fault")
    patience_s: float = Field(30.0, ge=0, le=3600, description="a request that met a fault which may pass is repeated for so long")

    @field_validator("prefix")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if value and not (value.endswith("/") and is_key(value[:-1])):
            raise ValueError("nothing, or segments of A-Z a-z 0-9 . _ - that do not start with a dot, each followed by '/'")
        return value

    @field_validator("endpoint_url")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parts = urlsplit(value)
                odd = parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.query or parts.fragment or parts.port == 0
            except ValueError:
                odd = True
            if odd:
                raise ValueError("http:// or https:// and a host, without user, password or query; credentials belong into boto3's own chain")
        return value

    @field_validator("kms_key_id")
    @classmethod
    def _for_kms(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not str(info.data.get("encryption")).startswith("aws:kms"):
            raise ValueError("a key only with encryption = 'aws:kms' or 'aws:kms:dsse'")
        return value


class RegistrySettings(Section):
    """Where MLflow is."""

    tracking_uri: SecretStr | None = Field(None, description="may hold a password; default: SQLite below home")
    artifact_root: str | None = None


class Schedule(Section):
    """When the night begins."""

    cron: str = Field("0 2 * * *", pattern=r"^[\dA-Za-z*/,\-]+( +[\dA-Za-z*/,\-]+){4}$")
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("an IANA time zone, for example Europe/Zurich") from None
        return value


class NightPolicy(Section):
    """When a night gives up: on one subject, and on itself."""

    set_aside_after: int = Field(3, ge=1, le=100, description="nights in a row that may fail on the same photos and settings; then the subject waits for new ones")
    batch: int = Field(16, ge=1, le=256, description="subjects that a worker trains in one flow run, the base loaded once")
    batch_wait_s: float = Field(43_200.0, gt=0, le=604_800, description="how long a batch on a worker is waited for, its place in the queue included; then it is cancelled")
    max_failed_share: float = Field(0.2, ge=0, le=1, description="share of the subjects tried that may fail for reasons of ours before the night counts as failed")


class Deploy(Section):
    """What `likeness deploy` makes on a Prefect server: three work pools of type `process`, and which of them trains."""

    control_pool: str = Field("control", pattern=POOL, description="work pool of workers that orchestrate, judge and register: who waits there takes no slot from those who work")
    control_slots: int = Field(2, ge=1, le=1000, description="flow runs of that pool at once, over all its workers; `recover` has slots of its own besides")
    cpu_pool: str = Field("cpu", pattern=POOL, description="work pool of workers without a GPU")
    cpu_slots: int = Field(2, ge=1, le=1000, description="flow runs of that pool at once, over all its workers")
    gpu_pool: str = Field("gpu", pattern=POOL, description="work pool of workers with one")
    gpu_slots: int = Field(1, ge=1, le=1000, description="flow runs of that pool at once, over all its workers: one for each GPU")
    trains_on: Literal["cpu", "gpu"] = Field("gpu", description="the pool on which `training` runs")

    silent_after_s: float = Field(120.0, ge=60, le=86_400, description="a flow run of a worker that sends no heartbeat for so long is taken for dead; living ones send one every 30 s")
    most_starts: int = Field(3, ge=2, le=100, description="a flow run that crashes is started again until it was started so often")
    recover_every_min: int = Field(5, ge=1, le=59, description="minutes between two runs of `recover`, which ends what a dead worker holds and begins again what it left")

    @model_validator(mode="after")
    def _three_pools(self) -> Self:
        names = (self.control_pool, self.cpu_pool, self.gpu_pool)
        if len(set(names)) < len(names):
            raise ValueError(f"three names, because each pool has its own limit; control_pool, cpu_pool and gpu_pool are {', '.join(map(repr, names))}")
        return self

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools that flows run on."""
        return tuple(dict.fromkeys((self.control_pool, self.cpu_pool, self.training_pool)))

    @property
    def training_pool(self) -> str:
        """Name of the pool that trains."""
        return self.gpu_pool if self.trains_on == "gpu" else self.cpu_pool

    @property
    def training_slots(self) -> int:
        """Its slots."""
        return self.gpu_slots if self.trains_on == "gpu" else self.cpu_slots


class Retention(Section):
    """What `likeness prune` deletes. What a Release was made of stays as long as the subject does."""

    attempts_days: int = Field(30, ge=0, le=36_500, description="attempts that no Release was made of (their records, adapters, samples) and checkpoints that nobody goes on "
                               "from are deleted when they were seen unneeded so many days ago")
    reports_days: int = Field(90, ge=0, le=36_500, description="HTML reports of subjects below home are deleted when they were written so many days ago")


class Up(Section):
    """The servers that `likeness up` starts on this machine, on loopback."""

    prefect_port: int = Field(4200, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)
    postgres_port: int | None = Field(None, ge=1, le=65535, description="PostgreSQL, from this machine's own programs, keeps both servers' tables; default: SQLite files below home")
    bucket_port: int | None = Field(None, ge=1, le=65535, description="a small S3 server on the folder bucket/ below home, to try the service with: it takes any credentials")

    @property
    def mlflow_address(self) -> str:
        """Of the MLflow server that `up` starts."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def bucket_address(self) -> str | None:
        """Of the S3 server that `up` starts, None if it starts none."""
        return None if self.bucket_port is None else f"http://127.0.0.1:{self.bucket_port}"

    @property
    def credentials(self) -> dict[str, str]:
        """For that server, which checks none, where boto3's own chain has none; empty if `up` starts no such server."""
        return {} if self.bucket_port is None else {"AWS_ACCESS_KEY_ID": "likeness", "AWS_SECRET_ACCESS_KEY": "likeness", "AWS_DEFAULT_REGION": "us-east-1"}


class Settings(Section):
    """All settings, checked."""

    home: Path
    base: str = "maquette"
    base_folder: Path | None = Field(None, description="absolute; a local copy of the base in diffusers layout, with safetensors: docs/bases.md")
    base_hub: bool = Field(False, description="download the catalogue's commit of the base from the Hugging Face Hub, once, to bases/ below home; only what is there already is used otherwise")
    recipe: Recipe = RECIPE.validate_python(preset("lora", "maquette"), strict=False)
    ladder: tuple[Recipe, ...] = Field((), description="recipes to try after a verdict `retry`, in this order; after them the rules of docs/ladder.md")
    max_attempts: int = Field(1, ge=1, le=MOST, description="trainings of one run at most, the first one counted; each costs what the first one did")
    battery: Battery
    gate: GatePolicy = GatePolicy()
    intake: IntakePolicy = IntakePolicy()
    backends: Backends = Backends()
    store: LocalStoreSettings | S3StoreSettings = Field(LocalStoreSettings(), discriminator="kind")
    registry: RegistrySettings = RegistrySettings()
    claims: ClaimPolicy = ClaimPolicy()
    schedule: Schedule = Schedule()
    night: NightPolicy = NightPolicy()
    deploy: Deploy = Deploy()
    retention: Retention = Retention()
    up: Up = Up()
    sampling: Sampling = Sampling()

    _sources: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("home", "base_folder")
    @classmethod
    def _anywhere(cls, value: Path | None) -> Path | None:
        return value if value is None else _absolute(value)

    @field_validator("claims")
    @classmethod
    def _outlasts_a_repeated_beat(cls, value: ClaimPolicy, info: ValidationInfo) -> ClaimPolicy:
        store = info.data.get("store")
        if isinstance(store, S3StoreSettings) and store.patience_s + store.timeout_s > value.ttl_s * 5 / 6:
            raise ValueError(f"a ttl_s of at least {(store.patience_s + store.timeout_s) * 6 / 5:g}, because store.patience_s + store.timeout_s is "
                             f"{store.patience_s + store.timeout_s:g}: a worker whose beat is being repeated would be taken for dead")
        return value

    @model_validator(mode="after")
    def _one_base(self) -> Self:
        for recipe in (self.recipe, *self.ladder):
            if recipe.base != self.base:
                raise ValueError(f"one base for all; base is {self.base!r}, a recipe says {recipe.base!r}: name it once, as `base`")
        return self

    @model_validator(mode="after")
    def _one_stack(self) -> Self:
        tracking = self.registry.tracking_uri
        if self.up.postgres_port is not None and (tracking is None or not tracking.get_secret_value().startswith("http")):
            raise ValueError(f"registry.tracking_uri = {self.up.mlflow_address!r} with up.postgres_port: else runs would be registered in a file that the server does not know")
        if self.up.bucket_port is not None and (not isinstance(self.store, S3StoreSettings) or self.store.endpoint_url != self.up.bucket_address):
            raise ValueError(f"store.kind = 's3' and store.endpoint_url = {self.up.bucket_address!r} with up.bucket_port: else nobody would write into that bucket")
        return self

    def explain(self) -> list[tuple[str, str, str]]:
        """(key, value as JSON, source) of every setting, secrets masked."""
        values = _flat(every_field(self))
        return [(key, _masked(json.dumps(value)), _source(key, self._sources) or "default in code") for key, value in sorted(values.items())]


def default_home() -> Path:
    """The user's data directory on this platform; nothing is created."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "likeness"
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local" / "share") / "likeness"      # XDG: relative ones are to be ignored


def own_file(config: Path | None = None) -> Path | None:
    """The likeness.toml that counts: the one that is named, or that of LIKENESS_CONFIG, or of the current folder; None without any.

    Raises:
        BadSettings: if one is named and not there.
    """
    named = config or (Path(os.environ["LIKENESS_CONFIG"]) if os.environ.get("LIKENESS_CONFIG") else None)
    if named is not None and not named.is_file():
        raise BadSettings(f"the settings file {named.name!r} is not there: check --config or LIKENESS_CONFIG")
    return named or (here if (here := Path("likeness.toml")).is_file() else None)


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read and check all settings. An empty environment variable counts as not set.

    Args:
        config: a file instead of ./likeness.toml; None looks at LIKENESS_CONFIG, then at the current folder.
        overrides: dotted keys to values, from flags: {"sampling.steps": 30}; None counts as not given.

    Raises:
        BadSettings: naming every problem, one line each.
    """
    own = own_file(config)
    environment = {name: text for name, text in sorted(os.environ.items())
                   if name.startswith(PREFIX) and text and name not in NOT_SETTINGS and not _KUBERNETES.fullmatch(name)}
    sources: dict[str, str] = {}
    merged: dict[str, Any] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = [("default", {"home": str(default_home())}), ("shipped likeness.toml", _toml(SHIPPED))]
    if own is not None and own.resolve() != SHIPPED.resolve():
        layers.append((own.name, _toml(own)))
    layers += [(f"environment {name}", _nested(_keys_of(name), _value(text))) for name, text in environment.items()]
    layers += [("flag", _nested(key.split("."), value)) for key, value in (overrides or {}).items() if value is not None]
    for source, layer in layers:
        _merge(merged, layer, sources, source)
    errors = _errors(merged)
    # LIKENESS_BASE=123 looks like a number and is a name: what should have been a string is taken as it was written.
    wanted = {_place(e, merged) for e in errors if e["type"] in ("string_type", "path_type")}
    texts = [(_keys_of(name), text) for name, text in environment.items() if ".".join(_keys_of(name)) in wanted]
    for keys, text in texts:
        _merge(merged, _nested(keys, text), sources, _source(".".join(keys), sources) or "environment")
    if texts:
        errors = _errors(merged)
    if errors:
        raise BadSettings("settings:\n" + "\n".join(f"  {_problem(e, merged, sources)}" for e in errors))
    settings = _read(merged)
    settings._sources = sources
    return settings


def _read(merged: Mapping[str, Any]) -> Settings:
    filled = json.loads(json.dumps(merged, default=str))
    base, ladder = filled["base"], filled.get("ladder")
    for recipe in (filled.get("recipe"), *(ladder if isinstance(ladder, list) else ())):
        if isinstance(recipe, dict) and isinstance(base, str):
            recipe.setdefault("base", base)      # a recipe that names no base is for the one base there is
            if isinstance(recipe["base"], str) and recipe.get("method") in METHODS:
                _weigh(recipe.get("objective"))
                _complete(recipe, preset(recipe["method"], recipe["base"]))
    if isinstance(base, str) and base in GUIDANCE and isinstance(filled.setdefault("sampling", {}), dict):
        filled["sampling"].setdefault("guidance", GUIDANCE[base])
    # As JSON, because records are strict and TOML's arrays are lists where tuples are meant
    return Settings.model_validate_json(json.dumps(filled))


def _weigh(objective: Any) -> None:
    """A prior that is named gets its own weight, unless one is named too: a preset without a prior has the weight 0, under which it would do nothing."""
    if isinstance(objective, dict) and objective.get("prior") in PRIOR_WEIGHTS:
        objective.setdefault("prior_weight", PRIOR_WEIGHTS[objective["prior"]])


def _complete(values: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Take from `others` what `values` does not say."""
    for key, value in others.items():
        if isinstance(value, Mapping) and isinstance(values.setdefault(key, {}), dict):
            _complete(values[key], value)
        else:
            values.setdefault(key, value)


def _errors(merged: Mapping[str, Any]) -> list[Any]:
    try:
        _read(merged)
    except ValidationError as e:
        return list(e.errors(include_url=False))
    return []


def _absolute(value: Path) -> Path:
    value = value.expanduser()
    if not value.is_absolute():
        raise ValueError("an absolute path")
    return value


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BadSettings(f"{path.name} is not TOML: {e}") from e
    except OSError as e:
        raise BadSettings(f"{path.name} cannot be read ({e.strerror}): check its permissions") from e


def _keys_of(name: str) -> list[str]:
    return name.removeprefix(PREFIX).lower().split("__")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    nested = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        nested = {key: nested}
    return nested


def _merge(into: dict[str, Any], new: Mapping[str, Any], sources: dict[str, str], source: str, prefix: str = "") -> None:
    for key, value in new.items():
        place = prefix + key
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                sources.pop(place, None)
            _merge(into[key], value, sources, source, f"{place}.")
            continue
        for stale in [k for k in sources if k.startswith(f"{place}.")]:
            del sources[stale]
        into[key] = value
        sources[place] = source


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _source(place: str, sources: Mapping[str, str]) -> str | None:
    """Who wrote `place`: itself, a part of it, or the whole that it is a part of."""
    return next((s for k, s in sources.items() if k == place or place.startswith((f"{k}.", f"{k}[")) or k.startswith(f"{place}.")), None)


def _masked(text: str) -> str:
    """`text` without the password of any address in it."""
    return re.sub(r"(://[^/@\s:]*):[^/@\s]+@", r"\1:***@", text)


def _place(error: Any, merged: Any) -> str:
    """The key an error is about, as it is written in the file: battery.prompts[2].category."""
    place, at = "", merged
    for part in error["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
            at = at[part] if isinstance(at, list) and part < len(at) else None
        elif isinstance(at, dict) and part not in at and part in (at.get("kind"), at.get("method")):
            continue                             # the tag of a union, which nobody wrote as a key
        else:
            place += f".{part}" if place else part
            at = at.get(part) if isinstance(at, dict) else None
    return place


def _problem(error: Any, merged: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    place = _place(error, merged)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):      # pydantic names the union, not the key that chooses in it
        key = error["ctx"]["discriminator"].strip("'")
        allowed = error["ctx"].get("expected_tags") or ", ".join(map(repr, METHODS))
        place, error = f"{place}.{key}", {"type": "literal_error" if "tag" in error["ctx"] else "missing", "msg": allowed, "input": error["ctx"].get("tag")}
    source = _source(place, sources)
    where = f" (from {source})" if source else ""
    method = next((part for part in error.get("loc", ()) if part in METHODS), None)
    if error["type"] == "extra_forbidden":
        known = sorted(_known_keys(method))
        plain = re.sub(r"\[\d+\]", "", place)
        if plain in known and method is None:
            return f"{place}: not a setting of this kind{where}"
        close = [] if plain in _known_keys(None) else difflib.get_close_matches(plain, known, 1, 0.6) or difflib.get_close_matches(plain.rpartition(".")[2], known, 1, 0.6)
        siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == plain.rpartition(".")[0]]
        return f"{place}: there is no such setting{f' of method {method!r}' if method else ''}{where}" + (f"; did you mean {close[0]}?" if close else f", allowed {', '.join(siblings)}")
    allowed = re.sub(r"^(Value error, |Input should be |String should )", "", error["msg"])
    if not place:
        return f"{allowed}{where}"
    secret = re.search(r"password|secret|token|uri|url|access_key", place)
    found = "nothing" if error["type"] == "missing" else "a value that is not shown" if secret else _masked(_brief(error["input"]))
    return f"{place}: found {found}, allowed {'a value' if allowed == 'Field required' else allowed}{where}"


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(method: str | None) -> set[str]:
    """Every key there is; with a method, of recipes only those of this method."""
    def walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, info in model.model_fields.items():
            yield prefix + name
            for part in _models_in(info.annotation):
                if method is None or part not in METHODS.values() or part is METHODS[method]:
                    yield from walk(part, f"{prefix}{name}.")
    return set(walk(Settings, ""))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
