"""The dossier of a Release: all that a registry shows of it, as tags, parameters and files. Pure: it knows no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likeness import digest
from likeness.errors import IntegrityError, RecipeError
from likeness.recipe import Recipe
from likeness.records import Adapter, BaseRef, Photo, Sample, SampleSet, Subject, TrainingSet, Verdict
from likeness.stages import StageRef
from likeness.version import code_version

DIGESTS_PER_TAG = 100          # a run's tag holds 8000 characters


@dataclass(frozen=True)
class Dossier:
    """All that the registry shows of one Release; every field comes from the Store.

    Attributes:
        stages: the published stages from ingest to judge.
        lineage: the chain as `likeness.lineage` writes it, stored as lineage.json.
        weights: the adapter's safetensors, already verified against `adapter.weights`.
        samples_png: a grid of samples.
        seconds: duration of each stage; shown as metrics, part of no digest.
        more: samples drawn besides, which decided nothing and may be delivered.
    """

    subject: Subject
    photos: tuple[Photo, ...]
    training_set: TrainingSet
    recipe: Recipe
    base: BaseRef
    adapter: Adapter
    samples: SampleSet
    verdict: Verdict
    stages: tuple[StageRef, ...]
    lineage: Mapping[str, Any]
    weights: bytes
    report_html: str
    samples_png: bytes
    seconds: Mapping[str, float] = field(default_factory=dict)
    code: str = field(default_factory=code_version)
    more: tuple[Sample, ...] = ()

    @property
    def model(self) -> str:
        """Name of the registered model."""
        return model_name(self.subject.id)

    @property
    def register_key(self) -> str:
        """Digest of (subject, training set, recipe): there is one Release of each."""
        return digest.of_json({"subject": self.subject.id, "training_set": self.training_set.digest, "recipe": self.recipe.digest})

    def check(self) -> None:
        """Refuse a dossier whose records do not belong together.

        Raises:
            IntegrityError: naming each contradiction.
        """
        claims = {
            "the adapter's training set": (self.adapter.training_set, self.training_set.digest),
            "the adapter's recipe": (self.adapter.recipe, self.recipe.digest),
            "the adapter's base": (self.adapter.base, self.base.digest),
            "the samples' adapter": (self.samples.adapter, self.adapter.digest),
            "the training set's subject": (self.training_set.subject, self.subject.digest),
            **{f"the adapter of sample {s.image.sha256[:12]}...": (s.adapter, self.adapter.digest) for s in self.more},
            "the weights": (digest.of_bytes(self.weights), self.adapter.weights.sha256),
        }
        wrong = [f"{what}: {found[:12]}... found, {needed[:12]}... needed" for what, (found, needed) in claims.items() if found != needed]
        if wrong:
            raise IntegrityError(f"this cannot be registered as one Release: {'; '.join(wrong)}; run the same command again, and if this stays, "
                                 f"look at `likeness lineage {self.subject.id}`")
        if self.verdict.kind != "accepted":
            raise RecipeError(f"the verdict is {self.verdict.kind}, only an accepted adapter is registered")


def model_name(subject: str) -> str:
    """Name of the registered model of a subject."""
    return f"likeness.{subject}"


def describe(dossier: Dossier) -> dict[str, str]:
    """The tags of run, logged model and version: every digest from photo to verdict. Lists are comma-separated, 100 to a tag."""
    training = dossier.training_set
    tags = {
        "likeness.register_key": dossier.register_key,
        "likeness.adapter": dossier.adapter.digest,
        "likeness.subject": dossier.subject.id,
        "likeness.noun": dossier.subject.noun,
        "likeness.training_set": training.digest,
        "likeness.recipe": dossier.recipe.digest,
        "likeness.method": dossier.recipe.method,
        "likeness.base": dossier.base.digest,
        "likeness.base_name": dossier.base.name,
        "likeness.base_revision": dossier.base.revision,
        "likeness.weights": dossier.adapter.weights.sha256,
        "likeness.samples": dossier.samples.digest,
        "likeness.battery": dossier.samples.battery,
        "likeness.verdict": dossier.verdict.digest,
        "likeness.verdict_kind": dossier.verdict.kind,
        "likeness.measured": dossier.verdict.measured,
        "likeness.policy": dossier.verdict.policy,
    }
    tags |= _list_tag("photos", [p.sha256 for p in dossier.photos])
    tags |= _list_tag("photo_sources", [p.source_sha256 for p in dossier.photos])
    tags |= _list_tag("portraits", [p.digest for p in training.portraits])
    tags |= _list_tag("held_out", [p.digest for p in training.held_out])
    tags |= _list_tag("captions", [c.digest for c in training.captions])
    tags |= _list_tag("sample_images", [s.image.sha256 for s in (*dossier.samples.samples, *dossier.more)])
    tags |= _list_tag("base_files", [f"{name}={sha}" for name, sha in sorted(dossier.base.files.items())], per_tag=40)
    for ref in dossier.stages:
        tags[f"likeness.stage.{ref.stage}"] = f"{ref.key}:{ref.digest}"
    # Which content is shown, without what differs from run to run (report, timings) or says who shows it (code)
    return {**tags, "likeness.content": digest.of_json(tags), "likeness.code": dossier.code}


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as one level with dotted names; lists as comma-separated words."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def _list_tag(name: str, items: Sequence[str], *, per_tag: int = DIGESTS_PER_TAG) -> dict[str, str]:
    parts = [items[i:i + per_tag] for i in range(0, len(items), per_tag)] or [[]]
    return {f"likeness.{name}" + (f".{i}" if i else ""): ",".join(part) for i, part in enumerate(parts)}


def write_files(folder: Path, dossier: Dossier, *, weights: bool) -> None:
    """The files of a Release, into `folder`; with `weights` the adapter itself too."""
    (folder / "recipe.json").write_bytes(digest.canonical(dossier.recipe.plain()))
    (folder / "verdict.json").write_bytes(digest.canonical(dossier.verdict.plain()))
    (folder / "base.json").write_bytes(digest.canonical(dossier.base.plain()))
    (folder / "lineage.json").write_bytes(digest.canonical(dict(dossier.lineage)))
    (folder / "report.html").write_text(dossier.report_html, encoding="utf-8")
    (folder / "samples.png").write_bytes(dossier.samples_png)
    if weights:
        (folder / "adapter.safetensors").write_bytes(dossier.weights)
