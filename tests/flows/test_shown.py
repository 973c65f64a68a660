"""What the command line prints of a result."""

from __future__ import annotations

from typing import Any

import pytest

from flows.cli import _show_result

WHY = "steps 24 (was 12), because [0%] of the samples are recognisably this person"


def attempt(verdict: str, share: float | None, *, counts: bool = False) -> dict[str, Any]:
    return {"recipe": "a" * 64, "method": "lora", "verdict": verdict, "why": WHY, "scores": {"identity_share": share}, "counts": counts}


@pytest.mark.parametrize("many", [False, True])
def test_attempts_are_shown_side_by_side_where_there_are_several(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    attempts = [attempt("retry", 0.25, counts=True), attempt("retry", None)]
    _show_result({"subject": "ada", "verdict": "retry", "scores": {"identity_share": 0.25}, "reasons": [{"message": "not enough"}], "release": None, "report": "r.html",
                  "attempts": attempts if many else attempts[:1], "next": {"why": WHY, "how": "run the same command with `--attempts 3`"}})
    shown = capsys.readouterr().out
    assert ("attempt 2" in shown) == many
    assert ("not measured" in shown) == many
    assert f"next: {WHY}; to allow it, run the same command with `--attempts 3`" in shown.replace("\n", " ")
