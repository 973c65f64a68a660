"""The eight stages: what a stage is called, which epoch its code is in, and the key of one call.

A stage is a function from content to content. Its key is the digest of its name, its code epoch, the digests of its inputs and the
parameters it reads: keys form a Merkle chain, and nothing about when, where or by whom is in them.

    python -m likeness.stages --accept      refresh tests/likeness/stage_sources.json after a change of stage code
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from likeness import digest
from likeness.digest import Digest
from likeness.errors import RecipeError
from likeness.records import Record, SubjectId

StageName = Literal["ingest", "crop", "caption", "assemble", "train", "sample", "judge", "register"]

# Raise a stage's epoch when its output may differ for the same inputs: everything it made before is then made again.
STAGES: Mapping[StageName, int] = {
    "ingest": 3,
    "crop": 3,
    "caption": 2,
    "assemble": 1,
    "train": 3,
    "sample": 4,
    "judge": 7,
    "register": 1,
}

FACES = tuple(f"models/faces/{name}.py" for name in ("align", "dlib_faces", "face", "facexlib_faces", "insightface_faces", "tools", "weights"))

METHODS = tuple(f"models/diffusion/{name}.py" for name in ("class_pictures", "decoder", "dreambooth", "families", "lora", "methods", "pivotal", "textual_inversion"))

# The source files whose change may change a stage's output, relative to the repository.
SOURCES: Mapping[StageName, tuple[str, ...]] = {
    "ingest": ("tasks/ingesting.py", "tasks/pictures.py", "models/faces/photos.py", *FACES, "likeness/intake/decode.py",
               "likeness/intake/decoder_child.py", "likeness/intake/reasons.py", "likeness/intake/sets.py", "likeness/intake/sources.py", "models/faces/clarity.py",
               "models/captions/slots.py", "models/maquette/vocabulary.py"),
    "crop": ("tasks/preparing.py", "tasks/pictures.py", "models/faces/portraits.py", *FACES),
    "caption": ("tasks/preparing.py", "models/captions/slots.py", "models/maquette/vocabulary.py", "models/captions/editable.py", "models/captions/image_to_text.py"),
    "assemble": ("tasks/preparing.py", "models/faces/portraits.py"),
    "train": ("tasks/training.py", "models/diffusion/bases.py", "models/diffusion/batches.py", "models/diffusion/checkpoint.py",
              "models/diffusion/loop.py", "models/diffusion/objective.py", *METHODS,
              # where a checkpoint is chosen:
              "likeness/choice.py", "likeness/gate.py", "models/quality/choice.py", "models/quality/measure.py", "models/diffusion/sampler.py", *FACES,
              "models/captions/slots.py", "models/maquette/vocabulary.py"),
    "sample": ("tasks/sampling.py", "tasks/pictures.py", "models/diffusion/bases.py", "models/diffusion/sampler.py", *METHODS),
    "judge": ("tasks/judging.py", "models/quality/base.py", "models/quality/features.py", "models/quality/findings.py", "models/quality/looking.py", "models/quality/measure.py",
              "models/quality/unsafe.py", *FACES, "models/captions/slots.py",
              "models/maquette/vocabulary.py", "likeness/gate.py"),
    "register": ("tasks/registering.py", "likeness/registry.py", "likeness/dossier.py"),
}

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "likeness" / "stage_sources.json"


class StageRef(BaseModel):
    """The output of one stage: which stage, under which key, with which content.

    Not a Record: there `digest` is the digest of the record itself, here it is that of what the stage made.
    """

    model_config = Record.model_config

    stage: StageName
    key: Digest
    digest: Digest


class Call(BaseModel):
    """One call of one stage for one subject, before it is made.

    `params` is plain JSON: those parameters, and only those, that the stage reads. Two calls with equal key have equal output.
    """

    model_config = Record.model_config

    stage: StageName
    subject: SubjectId
    inputs: tuple[StageRef, ...] = ()
    params: dict[str, Any] = {}

    @property
    def epoch(self) -> int:
        """The code epoch of the stage."""
        return STAGES[self.stage]

    @property
    def key(self) -> str:
        """Digest of stage name, epoch, digests of the inputs in order, and parameters; the subject's id is no part of it."""
        return digest.of_json({"stage": self.stage, "epoch": self.epoch, "inputs": [i.digest for i in self.inputs], "params": self.params})

    @property
    def folder(self) -> str:
        """Where all records of this subject's stages lie."""
        return f"subjects/{self.subject}/stages"

    @property
    def path(self) -> str:
        """Where the one object of this call lies in the Store."""
        return f"{self.folder}/{self.stage}/{self.key}.json"


class Published(BaseModel):
    """What lies at a call's path once it is made: everything that is needed to verify the chain without any other source."""

    model_config = Record.model_config

    state: Literal["published"] = "published"
    stage: StageName
    epoch: int = Field(ge=1)
    key: Digest
    inputs: tuple[StageRef, ...]
    params: dict[str, Any]
    output: dict[str, Any]
    digest: Digest

    @classmethod
    def of(cls, call: Call, output: Record) -> Published:
        """The published form of `output`."""
        return cls(stage=call.stage, epoch=call.epoch, key=call.key, inputs=call.inputs, params=call.params, output=output.plain(),
                   digest=output.digest)

    @property
    def ref(self) -> StageRef:
        """What later stages name as their input."""
        return StageRef(stage=self.stage, key=self.key, digest=self.digest)

    def faults(self) -> list[str]:
        """What does not hold in this record, empty if all does: its output against `digest`, what it was made from against `key`."""
        made_from = {"stage": self.stage, "epoch": self.epoch, "inputs": [i.digest for i in self.inputs], "params": self.params}
        faults = []
        if (found := digest.of_json(self.output)) != self.digest:
            faults.append(f"the output has digest {found[:12]}..., {self.digest[:12]}... is recorded")
        if (found := digest.of_json(made_from)) != self.key:
            faults.append(f"stage, epoch, inputs and parameters have key {found[:12]}..., {self.key[:12]}... is recorded")
        return faults


def fingerprint(source: str) -> str:
    """Digest of what Python code does: comments, docstrings and white space are left out. Stable over Python versions."""
    return digest.of_json(_plain(ast.parse(source)))


def _plain(node: Any) -> Any:
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            fields["body"] = fields["body"][1:]
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return node if isinstance(node, str | int | bool) else repr(node)


def current_sources() -> dict[str, dict[str, Any]]:
    """Epoch and fingerprints of each stage's source files, as they are now.

    Raises:
        RecipeError: if a file named in SOURCES is not there.
    """
    missing = [f"{stage}: {path}" for stage, paths in SOURCES.items() for path in paths if not (ROOT / path).is_file()]
    if missing:
        raise RecipeError(f"SOURCES in likeness/stages.py names files that are not there: {', '.join(missing)}")
    return {stage: {"epoch": STAGES[stage], "sources": {path: fingerprint((ROOT / path).read_text(encoding="utf-8")) for path in paths}}
            for stage, paths in SOURCES.items()}


def compare_sources(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each stage that differs, saying what to do."""
    lines = []
    for stage in sorted(set(stored) | set(current)):
        before, after = stored.get(stage), current.get(stage)
        if before == after:
            continue
        if before is None or after is None or before["epoch"] != after["epoch"]:
            lines.append(f"{stage}: new, gone, or its epoch was raised: run `python -m likeness.stages --accept`")
            continue
        was, now = before["sources"], after["sources"]
        changed = ", ".join(sorted(path for path in set(was) | set(now) if was.get(path) != now.get(path)))
        lines.append(f"{stage}: {changed} changed, the epoch is still {after['epoch']}: if an output may differ, raise STAGES[{stage!r}] in "
                     "likeness/stages.py; then, in either case, run `python -m likeness.stages --accept`")
    return lines


def main(arguments: list[str]) -> int:
    """Compare, or with --accept refresh, the stored snapshot; the exit code."""
    if arguments not in ([], ["--accept"]):
        print("usage: python -m likeness.stages [--accept]", file=sys.stderr)
        return 2
    current = current_sources()
    lines = compare_sources(json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.exists() else {}, current)
    if arguments:
        SNAPSHOT.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
        print("\n".join(["accepted:", *[line.split(":")[0] for line in lines]]) if lines else "nothing has changed")
        return 0
    print("\n".join(lines) or "nothing has changed")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
