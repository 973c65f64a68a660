"""Cells: results that are made once and kept, so that a benchmark goes on where it was stopped.

A cell's key is the digest of its name and of everything it depends on (weights, parameters). Numbers lie in `NAME-KEY.json`, arrays in
`NAME-KEY.npz`, files in a folder `NAME-KEY`; all are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Cells:
    """A folder of cells."""

    folder: Path

    def numbers(self, name: str, depends: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The JSON value of a cell, made now if it is not there."""
        path = self._path(name, depends, ".json")
        if not path.exists():
            _write(path, (json.dumps(make(), indent=1) + "\n").encode())
        return json.loads(path.read_text())

    def arrays(self, name: str, depends: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """The arrays of a cell, made now if they are not there."""
        path = self._path(name, depends, ".npz")
        if not path.exists():
            buffer = io.BytesIO()
            np.savez(buffer, **make())
            _write(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def files(self, name: str, depends: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of a cell, filled now by `make` if it is not there."""
        path = self._path(name, depends, "")
        if not path.exists():
            part = path.with_name(path.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            part.replace(path)
        return path

    def has(self, name: str, depends: Mapping[str, Any]) -> bool:
        """Whether the cell is there, in whatever form."""
        return any(self._path(name, depends, suffix).exists() for suffix in (".json", ".npz", ""))

    def _path(self, name: str, depends: Mapping[str, Any], suffix: str) -> Path:
        key = hashlib.sha256(json.dumps([name, depends], sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{name}-{key}{suffix}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
