"""`python -m bench.night_workers`: what a night costs beside its trainings on the whole stack of `likeness up`: servers, workers, batches, start-up of processes.

Subjects are invented and stages make next to nothing (bench/night.py), but they are claimed, published and opened through PostgreSQL's, the bucket's, Prefect's and the
workers' own processes. So all the time for which a batch holds the slot of the pool that trains is what orchestration costs a GPU: it is given per subject, and as a
share of a GPU job of 60 s. Core-seconds are those of all processes that `up` started and of what these started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.night import BATCH, GPU_JOB_S, PHOTOS
from flows.terminal import keep_to_home
from likeness.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")


def settings_of(home: Path, *, port: int, files: bool) -> Settings:
    """Of a home on PostgreSQL and a bucket, or on files."""
    servers = {} if files else {"up.postgres_port": port + 2, "up.bucket_port": port + 3, "registry.tracking_uri": f"http://127.0.0.1:{port + 1}", "store.kind": "s3",
                                "store.bucket": "likeness", "store.endpoint_url": f"http://127.0.0.1:{port + 3}", "store.addressing": "path"}
    changed: dict[str, Any] = {"up.prefect_port": port, "up.mlflow_port": port + 1, "night.batch": BATCH, **servers}
    for name, value in changed.items():          # workers read the environment
        os.environ["LIKENESS_" + name.upper().replace(".", "__")] = str(value)
    return load_settings(overrides={"home": str(home)})


def core_seconds(pids: list[int]) -> float:
    """User and system time of processes, with what they have waited for."""
    spent = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        spent += sum(int(fields[i]) for i in range(11, 15))
    return spent / TICKS


def night(settings: Settings, count: int) -> dict[str, Any]:
    """One night over `count` new subjects."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    from flows import services
    from flows.deploying import apply, connected, plan_of
    from likeness.night import last_nights
    from likeness.records import Consent, Enrolment, Subject
    from tasks.runtime import Tools

    plan = plan_of(settings)
    stubbed = replace(plan, deployments=tuple(replace(d, entrypoint=f"bench.stub_flows.{d.flow}", cron=None) for d in plan.deployments if d.flow in ("nightly", "preparing", "training")))

    async def deploy(address: str) -> None:
        async with connected(address) as client:
            await apply(client, stubbed)

    async def begin() -> Any:
        async with PrefectClient(services.prefect_api(settings)) as client:
            deployment = await client.read_deployment_by_name("nightly/likeness")
            return (await client.create_flow_run_from_deployment(deployment.id)).id

    async def state(run: Any) -> Any:
        async with PrefectClient(services.prefect_api(settings)) as client:
            return await client.read_flow_run(run)

    async def held() -> dict[str, list[float]]:
        """How long each batch held the slot of its pool: from being taken by a worker, which then starts a process, to its end."""
        found: dict[str, list[float]] = {"preparing": [], "training": []}
        async with PrefectClient(services.prefect_api(settings)) as client:
            for run in await client.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["likeness"])), limit=200):
                states = await client.read_flow_run_states(run.id)
                taken = min(s.timestamp for s in states if s.is_pending())
                found.setdefault(run.name.partition(" ")[0], []).append((max(s.timestamp for s in states) - taken).total_seconds())
        return found

    services.up(settings, None, deploy=lambda address: asyncio.run(deploy(address)), tell=lambda words: print(words, flush=True))
    try:
        tools = Tools(settings)
        photos = settings.home / "photos"
        photos.mkdir()
        for n in range(PHOTOS):
            (photos / f"{n}.jpg").write_bytes(bytes([n]) * 1000)
        for n in range(count):
            tools.enrol(Enrolment(subject=Subject(id=f"subject-{n:05d}", noun="man", consent=Consent(source="bench")), source=str(photos)))
        pids = [s.pid for s in services.seen(settings) if s.pid is not None]
        spent, began = core_seconds(pids), time.monotonic()
        run = asyncio.run(begin())
        while not (now := asyncio.run(state(run))).state.is_final():
            time.sleep(1.0)
        wall = time.monotonic() - began
        if not now.state.is_completed():
            raise SystemExit(f"the night ended as {now.state.name}: {services.Services(settings.home).log('worker-control')} says more")
        (numbers,) = last_nights(tools.store, 1)
        if numbers.counts["accepted"] != count:
            raise SystemExit(f"of {count} subjects {numbers.counts['accepted']} were accepted: these numbers would be of another night")
        spent = core_seconds(pids) - spent
        slots = asyncio.run(held())
    finally:
        services.down(settings)
    each = sum(slots["training"]) / count
    return {"subjects": count, "batches": {flow: len(slots[flow]) for flow in ("preparing", "training")}, "core_s_each": spent / count, "wall_s": wall,
            "slot_s_each": each, "share": each / (each + GPU_JOB_S), "slot_s": slots}


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.night_workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=20, help="subjects")
    p.add_argument("--port", type=int, default=21_200, help="this one and the three after it")
    p.add_argument("--files", action="store_true", help="SQLite and a folder instead of PostgreSQL and a bucket")
    p.add_argument("--out", type=Path, default=Path("bench-results/night-workers"))
    a = p.parse_args()
    home = Path(tempfile.mkdtemp(prefix="likeness-bench-"))
    os.environ["PYTHONPATH"] = str(ROOT)                # workers import bench.stub_flows
    try:
        settings = settings_of(home, port=a.port, files=a.files)
        keep_to_home(home)
        found = night(settings, a.count)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "numbers.json").write_text(json.dumps(found | {"files": a.files, "batch": BATCH, "gpu_job_s": GPU_JOB_S}, indent=1) + "\n")
    Console().print(f"{found['subjects']} subjects, batches {found['batches']}: {found['core_s_each']:.2f} core-s each on all processes, {found['wall_s']:.0f} s in all; the slot that trains is held "
                    f"{found['slot_s_each']:.2f} s each besides the work: {found['share']:.1%} of it with a GPU job of {GPU_JOB_S:.0f} s", soft_wrap=True)


if __name__ == "__main__":
    main()
