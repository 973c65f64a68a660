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
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from likeness.errors import BadSettings
from likeness.gate import GatePolicy
from likeness.intake.policy import IntakePolicy
from likeness.once import ClaimPolicy
from likeness.recipe import Lora, Recipe
from likeness.records import BatteryPrompt, Record

SHIPPED = Path(__file__).with_name("likeness.toml")
PREFIX = "LIKENESS_"
NOT_SETTINGS = {"LIKENESS_CONFIG", "LIKENESS_REQUIRE_ALL"}


class Battery(Record):
    """The fixed prompts on which every adapter is sampled."""

    name: str
    seeds: int = Field(2, ge=1, le=64, description="pictures of each prompt")
    prompts: tuple[BatteryPrompt, ...] = Field(min_length=1)


class Sampling(Record):
    """How samples are drawn."""

    steps: int = Field(20, ge=1, le=1000)
    guidance: float = Field(3.0, ge=0, le=50)
    batch: int = Field(8, ge=1, le=256)


class Section(BaseModel):
    """A part of the settings that is not content: places and addresses, never digested."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Backends(Section):
    """Which network does what."""

    detect: Literal["dlib"] = "dlib"
    identity: Literal["dlib"] = "dlib"
    mask: Literal["ellipse"] = "ellipse"
    captions: Literal["slots"] = "slots"


class LocalStoreSettings(Section):
    """A folder."""

    kind: Literal["local"] = "local"
    root: Path | None = Field(None, description="absolute; default: store/ below home")


class RegistrySettings(Section):
    """Where MLflow is."""

    tracking_uri: SecretStr | None = Field(None, description="may hold a password; default: SQLite below home")
    artifact_root: str | None = None


class Schedule(Section):
    """When the night begins."""

    cron: str = Field("0 2 * * *", pattern=r"^\S+(\s+\S+){4}$")
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in available_timezones():
            raise ValueError("an IANA time zone is needed, for example Europe/Zurich")
        ZoneInfo(value)
        return value


class Settings(Section):
    """All settings, checked."""

    home: Path
    base: str = "maquette"
    base_folder: Path | None = None
    recipe: Recipe = Lora()
    ladder: tuple[Recipe, ...] = ()
    battery: Battery
    gate: GatePolicy = GatePolicy()
    intake: IntakePolicy = IntakePolicy()
    backends: Backends = Backends()
    store: LocalStoreSettings = LocalStoreSettings()
    registry: RegistrySettings = RegistrySettings()
    claims: ClaimPolicy = ClaimPolicy()
    schedule: Schedule = Schedule()
    sampling: Sampling = Sampling()

    sources: Annotated[Mapping[str, str], Field(exclude=True, repr=False)] = {}

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError("an absolute path is needed")
        return value

    def explain(self) -> list[tuple[str, str, str]]:
        """(key, value, source) of every setting, secrets masked."""
        return [(key, json.dumps(value), self.sources.get(key, "default in code")) for key, value in sorted(_flat(self.model_dump(mode="json")).items())]


def default_home() -> Path:
    """The user's data directory of this platform."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "likeness"


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read and check all settings.

    Args:
        config: a file instead of ./likeness.toml; None looks at LIKENESS_CONFIG, then at the current folder.
        overrides: dotted keys to values, from flags: {"sampling.steps": 30}.

    Raises:
        BadSettings: naming every problem.
    """
    named = config or (Path(os.environ["LIKENESS_CONFIG"]) if os.environ.get("LIKENESS_CONFIG") else None)
    own = named or Path("likeness.toml")
    if named is not None and not named.is_file():
        raise BadSettings("the settings file that was named is not there: check --config or LIKENESS_CONFIG")
    merged: dict[str, Any] = {"home": str(default_home())}
    sources = {"home": "default"}
    _merge(merged, _toml(SHIPPED), sources, "shipped likeness.toml")
    if own.is_file() and own.resolve() != SHIPPED.resolve():
        _merge(merged, _toml(own), sources, own.name)
    for name, text in sorted(os.environ.items()):
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _merge(merged, _nested(name.removeprefix(PREFIX).lower().split("__"), _value(text)), sources, f"environment {name}")
    for key, value in (overrides or {}).items():
        _merge(merged, _nested(key.split("."), value), sources, "flag")
    try:
        # JSON, because records are strict and TOML's arrays are lists where tuples are meant
        return Settings.model_validate_json(json.dumps(merged, default=str)).model_copy(update={"sources": sources})
    except ValidationError as e:
        raise BadSettings("settings:\n" + "\n".join(f"  {_problem(x, sources)}" for x in e.errors(include_url=False))) from e


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BadSettings(f"{path.name} is not TOML: {e}") from e


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if not isinstance(value, dict) else text


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _merge(into: dict[str, Any], new: Mapping[str, Any], sources: dict[str, str], source: str, prefix: str = "") -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, sources, source, f"{prefix}{key}.")
        else:
            into[key] = value
            sources[prefix + key] = source


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _problem(error: Any, sources: Mapping[str, str]) -> str:
    place = ".".join(str(p) for p in error["loc"])
    source = next((s for k, s in sources.items() if k == place or place.startswith(k + ".")), None)
    where = f" (from {source})" if source else ""
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place, _known_keys(), 1, 0.6)
        return f"{place}: there is no such setting{where}" + (f"; did you mean {close[0]}?" if close else "")
    found = "a secret" if re.search("password|secret|token|uri", place) else repr(error.get("input"))[:80]
    return f"{place}: found {found}, {error['msg'][0].lower()}{error['msg'][1:]}{where}"


def _known_keys() -> list[str]:
    keys: list[str] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            keys.append(prefix + name)
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                walk(info.annotation, f"{prefix}{name}.")

    walk(Settings, "")
    return keys
