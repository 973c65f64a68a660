"""docs/reference.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from flows.reference import render


def test_the_reference_is_up_to_date(root: Path) -> None:
    assert (root / "docs" / "reference.md").read_text(encoding="utf-8") == render(), "run `python -m flows.reference > docs/reference.md`"
