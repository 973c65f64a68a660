"""Bases from the Hugging Face Hub, and whatever else is pinned there: one commit, safetensors only, and only where the settings allow a download.

The snapshot lies in a folder that the caller names, in the Hub's own cache layout. What was downloaded once is found there without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from likeness.errors import RecipeError, ServerUnreachable, UnknownBase, translated
from models.diffusion.bases import CATALOGUE
from models.diffusion.families import FAMILIES


def place(name: str, *, folder: Path | None, cache: Path, download: bool) -> Path | None:
    """Where a base lies: the folder that was named, or the pinned snapshot; None for one that ships, or that nobody knows.

    Args:
        cache: where snapshots are kept; made when something is downloaded.
        download: whether the Hub may be asked; without, only what is in `cache` counts.

    Raises:
        UnknownBase: it is not on this machine and must not be fetched, or the Hub does not give it to us.
        ServerUnreachable: the Hub does not answer.
    """
    entry = CATALOGUE.get(name)
    if folder is not None or entry is None or entry.hub is None:
        return folder
    repository, commit = entry.hub
    return snapshot(repository, commit, cache=cache, download=download, files=wanted_files(name), what=f"base {name!r}", allow="base_hub = true",
                    own=f"set base_folder to a copy of {repository} in diffusers layout (safetensors)", absent=UnknownBase)


def snapshot(repository: str, commit: str, *, cache: Path, download: bool, files: Sequence[str], what: str, own: str, allow: str, absent: type[RecipeError]) -> Path:
    """The folder of one commit of a repository.

    Args:
        files: patterns of the files that are wanted.
        what, own, allow: for messages: what it is, how to do without the Hub, the setting that allows a download.

    Raises:
        absent: it is not on this machine and must not be fetched, or the Hub does not give it to us.
        ServerUnreachable: the Hub does not answer.
    """
    with translated(f"downloading {what}"):
        try:
            return Path(snapshot_download(repository, revision=commit, cache_dir=cache, local_files_only=not download, allow_patterns=list(files)))
        except (RepositoryNotFoundError, RevisionNotFoundError) as e:
            raise absent(f"the Hub does not give commit {commit[:12]} of {repository} to us: accept its terms there and set HF_TOKEN, or {own}") from e
        except LocalEntryNotFoundError as e:
            if download:
                raise ServerUnreachable(f"{what} is not on this machine and the Hub does not answer: check the network and HF_HUB_OFFLINE, or {own}") from e
            raise absent(f"{what} is not on this machine: {own}, or {allow} to download commit {commit[:12]} once") from e
        except httpx.HTTPError as e:
            raise ServerUnreachable(f"the Hub failed while giving {what}: the same command may work in a moment; or {own}") from e


def wanted_files(name: str) -> list[str]:
    """Patterns of the files that a base is loaded from: one precision, no pickles, none of the other formats that lie beside them."""
    ends = FAMILIES[CATALOGUE[name].family].ends
    weights = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", *(f"text_encoder{end}/model.safetensors" for end in ends)]
    parts = ["unet", "vae", "scheduler", *(f"{part}{end}" for end in ends for part in ("text_encoder", "tokenizer"))]
    return ["model_index.json", *weights, *(f"{part}/*.{kind}" for part in parts for kind in ("json", "txt"))]
