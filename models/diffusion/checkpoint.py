"""Checkpoints and adapters as safetensors bytes whose header says what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from likeness.errors import BadCheckpoint
from likeness.records import CurvePoint, DevicePlan
from models.diffusion.loop import Checkpoint


def write(checkpoint: Checkpoint, *, training: str) -> bytes:
    """The checkpoint as bytes; `training` is the key of the stage it belongs to."""
    tensors = {f"tensor/{k}": v for k, v in checkpoint.tensors.items()} | {f"moment/{k}": v for k, v in checkpoint.moments.items()}
    tensors |= {f"best/{k}": v for k, v in checkpoint.best.items()}
    header: dict[str, Any] = {"training": training, "step": checkpoint.step, "losses": checkpoint.losses, "pending": checkpoint.pending}
    if checkpoint.device:
        header["device"] = [plan.plain() for plan in checkpoint.device]
    if checkpoint.points:
        header["points"] = [point.plain() for point in checkpoint.points]
    body = save(tensors, {"likeness": json.dumps(header)})
    return hashlib.sha256(body).digest() + body      # a torn or flipped byte must not train on


def read(data: bytes, *, training: str) -> Checkpoint:
    """The checkpoint in these bytes.

    Raises:
        BadCheckpoint: truncated, corrupt, or of another training.
    """
    body = data[32:]
    if len(data) < 40 or hashlib.sha256(body).digest() != data[:32]:
        raise BadCheckpoint("a checkpoint is truncated or corrupt: the one before it is used")
    header = json.loads(metadata(body)["likeness"])
    if header["training"] != training:
        raise BadCheckpoint("a checkpoint belongs to another training: it is not used")
    tensors = load(body)
    return Checkpoint(step=header["step"], losses=[(s, v) for s, v in header["losses"]], pending=(header["pending"][0], header["pending"][1]),
                      device=tuple(DevicePlan.model_validate(plan) for plan in header.get("device", ())),
                      points=tuple(CurvePoint.model_validate(point) for point in header.get("points", ())),
                      best={k[5:]: v for k, v in tensors.items() if k.startswith("best/")},
                      tensors={k[7:]: v for k, v in tensors.items() if k.startswith("tensor/")},
                      moments={k[7:]: v for k, v in tensors.items() if k.startswith("moment/")})


def write_adapter(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Adapter weights as safetensors with a header (training set, recipe, base, trigger...). The same tensors give the same bytes.

    One metadata key only: safetensors writes several in the random order of a hash map, and equal weights had two digests.
    """
    return save(dict(sorted(tensors.items())), {"likeness": json.dumps(dict(sorted(header.items())))})


def read_adapter(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of an adapter file.

    Raises:
        BadCheckpoint: not a safetensors file that Likeness wrote.
    """
    try:
        return load(data), json.loads(metadata(data)["likeness"])
    except (SafetensorError, KeyError, ValueError) as e:
        raise BadCheckpoint("this adapter is not a safetensors file with a Likeness header: train it again or import it first") from e


def metadata(data: bytes) -> dict[str, str]:
    """The string header of safetensors bytes: 8 bytes little-endian length, then JSON whose `__metadata__` it is."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, 100_000_000):
        raise BadCheckpoint("not a safetensors file: its header is longer than the file")
    values = json.loads(data[8:8 + length]).get("__metadata__", {})
    return {str(k): str(v) for k, v in values.items()}
