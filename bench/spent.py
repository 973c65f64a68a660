"""What a training costs, as a process of its own: core-seconds for each step after imports and caches, core-seconds in all, peak memory.

The program under measurement says how far it is, as tqdm does: `Steps: ... 12/200 [`. Whenever it does, its processor time is read, so that one run tells the
steps from what comes before and after them. Linux only: other systems have no /proc.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEP = re.compile(r"Steps:[^\r\n]*?(\d+)/(\d+) \[")
SETTLED = 10           # steps after which what happens once has happened
TAIL = 15              # lines of a failed program that are shown


@dataclass(frozen=True)
class Spent:
    """Core-seconds (user and system, all threads), memory in MiB: the most that was resident at any of its reports."""

    steps: int
    core_s_per_step: float
    core_s: float
    peak_mib: float

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def per_step(seen: Sequence[tuple[int, float]], total: int) -> float:
    """Slope of (step, core-seconds so far) from step SETTLED on, or from the middle of a run that is shorter.

    Raises:
        ValueError: fewer than two different steps were seen.
    """
    rest = [s for s in seen if s[0] >= min(SETTLED, max(1, total // 2))]
    if not rest or rest[0][0] == rest[-1][0]:
        raise ValueError(f"{len(seen)} reports of progress, two different steps after step {min(SETTLED, total // 2)} are needed")
    return (rest[-1][1] - rest[0][1]) / (rest[-1][0] - rest[0][0])


def run_measured(command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str]) -> Spent:
    """Run a training program to its end, its output in `log`.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    seen: list[tuple[int, float]] = []
    total, rest, peak = 0, "", 0.0
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, env=dict(env))
    assert process.stdout is not None
    try:
        with log.open("wb", buffering=0) as kept:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                kept.write(chunk)
                rest += chunk.decode("utf-8", "replace")
                peak = max(peak, _peak_mib(process.pid))
                found = list(STEP.finditer(rest))
                if found:
                    step, total = int(found[-1][1]), int(found[-1][2])
                    if not seen or seen[-1][0] != step:
                        seen.append((step, _core_seconds(process.pid)))
                    rest = rest[found[-1].end():]
                rest = rest[-4096:]
    except BaseException:
        process.kill()
        process.wait()
        raise
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        raise RuntimeError("\n".join([f"{Path(command[1]).name if len(command) > 1 else command[0]} ended with {process.returncode}; its last lines:", *lines[-TAIL:]]))
    return Spent(total, per_step(seen, total), used.ru_utime + used.ru_stime, peak)


def _core_seconds(pid: int) -> float:
    """User and system time so far of a process that is still there or not yet waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    """The most memory that a process had resident so far; 0 once it has ended. Not `ru_maxrss`: a child begins with its parent's."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
