"""Run every `bash` and `python` block of README.md, docs/ and the runbook, and follow every relative link.

    python tests/docs_check.py [PAGE ...]

The blocks of one page run in order, in one temporary home, from a folder that holds a copy of `examples/`. A block that cannot run here
says why on its fence: ```bash no-run: needs a GPU worker
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")
LIMIT_S = 600


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, why it is not run (None: it is), its text."""

    page: Path
    line: int
    language: str
    no_run: str | None
    body: str


def blocks_of(page: Path) -> list[Block]:
    """The `bash` and `python` blocks of a page, in order.

    Raises:
        SystemExit: if a block is marked no-run without a reason, or marked with anything else.
    """
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, _, mark = match["info"].strip().partition(" ")
        if language not in ("bash", "python"):
            continue
        line = text[:match.start()].count("\n") + 1
        reason: str | None = None
        if mark:
            word, _, reason = (part.strip() for part in mark.partition(":"))
            if word != "no-run" or not reason:
                raise SystemExit(f"{page.relative_to(ROOT)}:{line}: '{mark}' after ```{language}: only 'no-run: REASON' may stand there")
        found.append(Block(page, line, language, reason, match["body"]))
    return found


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text = FENCE.sub("", page.read_text())
    targets = (match["target"].split("#")[0] for match in LINK.finditer(text))
    return [t for t in targets if t and not re.match(r"[a-z]+:", t) and not (page.parent / t).exists()]


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one block in `folder` with a home of its own; `bash` stops at the first command that fails."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LIKENESS_", "PREFECT_", "MLFLOW_", "AWS_"))} | {
        "HOME": str(home), "LIKENESS_HOME": str(home / "likeness"), "PREFECT_HOME": str(home / "prefect"), "HF_HUB_OFFLINE": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180", "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block.body] if block.language == "bash" else [sys.executable, "-c", block.body]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, check=False)


def check(page: Path) -> int:
    """Run one page; returns the number of things that are wrong with it."""
    wrong = 0
    name = page.relative_to(ROOT)
    for target in broken_links(page):
        print(f"{name}: the link to {target} leads nowhere")
        wrong += 1
    with tempfile.TemporaryDirectory(prefix="likeness-docs-") as folder:
        if (ROOT / "examples").is_dir():
            shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        for block in blocks_of(page):
            where = f"{name}:{block.line}"
            if block.no_run:
                print(f"{where}: {block.language} not run: {block.no_run}")
                continue
            began = time.monotonic()
            done = run(block, Path(folder))
            print(f"{where}: {block.language} {'ok' if done.returncode == 0 else f'FAILED, exit {done.returncode}'} ({time.monotonic() - began:.1f} s)", flush=True)
            if done.returncode:
                print(done.stdout[-3000:] + done.stderr[-3000:])
                wrong += 1
    return wrong


def main() -> None:
    """Check the given pages, or all."""
    pages = [Path(p).resolve() for p in sys.argv[1:]] or [p for p in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "infra" / "runbook.md", *sorted((ROOT / "docs").rglob("*.md"))] if p.exists()]
    wrong = sum(check(page) for page in pages)
    print(f"docs-check: {len(pages)} pages, {wrong} wrong")
    raise SystemExit(wrong != 0)


if __name__ == "__main__":
    main()
