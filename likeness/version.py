"""Which code this is: package version, and the commit when it runs from a checkout. Never a path, never a host."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from likeness.errors import translated

_ROOT = Path(__file__).resolve().parents[1]


@cache
def code_version() -> str:
    """`0.1.0`, in a checkout `0.1.0+g<commit>`, with `.dirty` if tracked files differ from the commit."""
    try:
        release = version("likeness")
    except PackageNotFoundError:
        release = "0"                # run from a checkout that is not installed: the commit says it all
    if not (_ROOT / ".git").exists():
        return release
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return release
    return f"{release}+g{commit}{'.dirty' if _git('status', '--porcelain', '--untracked-files=no') else ''}"


def _git(*arguments: str) -> str | None:
    """What git says, None if it is not installed or this is no checkout for it."""
    with translated("asking git for the commit"):
        try:
            done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
    return done.stdout.strip() if done.returncode == 0 else None
