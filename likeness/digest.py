"""Digests: the name of a content is the sha256 of its bytes, or of its canonical JSON.

Canonical JSON here: UTF-8, keys sorted by code point, no white space, no NaN or infinity, floats as Python's shortest round-trip
`repr`. Equal records have equal digests on every machine; a digest never depends on times, hosts, paths or run ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any

from pydantic import StringConstraints

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def of_bytes(data: bytes) -> str:
    """sha256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """Canonical JSON of plain data (dict with str keys, list, str, int, float, bool, None).

    Raises:
        ValueError: on NaN, infinity, a key that is not a string or a type that JSON has not.
    """
    _check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def of_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return of_bytes(canonical(value))


def _check(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"keys must be strings to have a digest, found {key!r}")
            _check(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("NaN and infinity have no digest")
    elif value is not None and not isinstance(value, str | int | bool):
        raise ValueError(f"{type(value).__name__} has no canonical JSON")
