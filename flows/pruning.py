"""prune: what nobody needs any more, over all subjects and this home's reports."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from likeness.errors import LikenessError, translated
from likeness.night import enrolled
from likeness.retention import prune
from tasks.runtime import Tools

DAY_S = 86_400.0


def prune_all(tools: Tools, *, dry_run: bool = False) -> dict[str, Any]:
    """Prune every enrolled subject by the settings. One subject's damaged record ends theirs alone.

    Returns:
        The document of `likeness prune --json`.
    """
    policy, today = tools.settings.retention, datetime.now(UTC).date()
    subjects, failed = [], []
    for subject in enrolled(tools.store):
        try:
            subjects.append(prune(tools.store, subject, today=today, days=policy.attempts_days, dry_run=dry_run).plain())
        except LikenessError as e:
            failed.append({"subject": subject, "code": e.code, "message": e.message})
    old = _old_reports(tools.settings.home / "reports", policy.reports_days)
    if not dry_run:
        for path in old:
            with translated("deleting an old report"):
                path.unlink(missing_ok=True)
    return {"dry_run": dry_run, "subjects": subjects, "failed": failed, "reports": len(old)}


def _old_reports(folder: Path, days: int) -> list[Path]:
    """Reports, and what a killed process left of one; every run writes its subject's anew."""
    if not folder.is_dir():
        return []
    before = time.time() - days * DAY_S
    return sorted(path for path in folder.iterdir() if path.suffix in (".html", ".part") and path.stat().st_mtime <= before)
