"""`python -m bench.night`: what orchestrating a night costs for each subject, with everything that a GPU, a network of faces or a photo would cost taken out.

A night with workers over N invented subjects. Every stage is claimed, published and opened again in a real store by the real code; what a stage *makes* is a few small records,
written at once. Prefect is taken out: tasks and flows are called as the functions that they are, and batches are promised instead of sent. So what is left is: who is due, the
batches, `advance`, claims, records, lineage and reports.

Core-seconds, so that a busy machine does not count. The share is of a GPU job of 60 s for each subject.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from flows.terminal import keep_to_home
from likeness.once import Claim
from likeness.settings import Settings, load_settings

GPU_JOB_S = 60.0
PHOTOS, BATCH = 5, 16


def made(tools: Any, call: Any, output: type) -> Any:
    """What a stage would make, small: the records of the stage, pictures of 8 by 8 pixels, weights of a kilobyte."""
    from likeness import records as r
    from likeness.store import put_blob
    from tasks import pictures
    from tasks.judging import Judgement
    from tasks.preparing import assemble

    subject, store = call.subject, tools.store
    inputs: dict[str, Any] = {ref.stage: ref for ref in call.inputs}

    def picture(kind: str, shade: int) -> Any:
        return pictures.put(store, f"subjects/{subject}/{kind}", np.full((8, 8, 3), shade, np.uint8))

    if output is r.Intake:
        blobs = [picture("photos", n) for n in range(PHOTOS)]
        return r.Intake(photos=tuple(r.Photo(sha256=b.sha256, source_sha256=b.sha256, blob=b, width_px=8, height_px=8) for b in blobs),
                        judgements=tuple(r.PhotoJudgement(name=f"{n}.jpg", verdict="accept", reason=None, message="used") for n in range(PHOTOS)),
                        set=r.SetJudgement(verdict="ok", reason=None, message="enough"))
    if output is r.PortraitSet:
        face = r.FaceMeasures(box_px=(1.0, 1.0, 7.0, 7.0), eye_distance_px=3.0, roll_deg=0.0, sharpness=1.0, score=1.0, visible=1.0)
        return r.PortraitSet(portraits=tuple(
            r.Portrait(photo=p.sha256, crop=picture("portraits", 100 + n), mask=picture("portraits", 200), side_px=8, framing="tight", face=face,
                       embedding=tuple(float(v) for v in np.linspace(0, 1 + n, 128))) for n, p in enumerate(tools.open(inputs["ingest"], subject, r.Intake).photos)))
    if output is r.CaptionSet:
        return r.CaptionSet(captions=tuple(r.Caption(portrait=p.digest, text=f"a photo, number {n}", source="slots")
                                           for n, p in enumerate(tools.open(inputs["crop"], subject, r.PortraitSet).portraits)))
    if output is r.TrainingSet:
        return assemble(tools.open(inputs["crop"], subject, r.PortraitSet), tools.open(inputs["caption"], subject, r.CaptionSet), subject=call.params["subject"],
                        noun="man", trigger=call.params["trigger"], held_out=1)
    if output is r.Adapter:
        weights = put_blob(store, f"subjects/{subject}/adapters", subject.encode() * 128, media="application/vnd.safetensors")
        return r.Adapter(training_set=inputs["assemble"].digest, recipe=tools.settings.recipe.digest, base=call.params["base"], weights=weights,
                         losses=tuple((n, 1.0) for n in range(10, 210, 10)), steps=200)
    if output is r.SampleSet:
        battery = tools.settings.battery
        return r.SampleSet(adapter=inputs["train"].digest, battery=battery.digest, samples=tuple(
            r.Sample(adapter=inputs["train"].digest, prompt=prompt.text("sks man"), category=prompt.category, slots=prompt.slots, seed=seed, image=picture("samples", n))
            for n, (prompt, seed) in enumerate(battery.every())))
    if output is Judgement:
        samples = tools.open(inputs["sample"], subject, r.SampleSet).samples
        measured = r.Measurements(backend="dlib", bank="b" * 64, threshold=0.45, ceiling=0.25, floor=0.65, usable_portraits=PHOTOS, scores=tuple(
            r.SampleScore(image=s.image.sha256, category=s.category, faces=1, identity_distance=0.3, position=0.9, nearest_training=0.5) for s in samples))
        return Judgement(measured=measured, verdict=r.Verdict(kind="accepted", reasons=(), scores={"identity_share": 1.0}, measured=measured.digest,
                                                             policy=tools.settings.gate.digest, delivered=tuple(s.image.sha256 for s in samples[:tools.settings.gate.max_delivered])))
    judged = tools.open(inputs["judge"], subject, Judgement)
    return r.Release(subject=subject, model=f"likeness.{subject}", version=1, adapter=inputs["train"].digest, verdict=judged.verdict.digest)


def small_tools(settings: Settings) -> Any:
    """The product's Tools, whose stages are claimed and published and make `made`; embedding the real bank takes minutes and is no part of a night."""
    from tasks.runtime import Tools

    class Small(Tools):
        def once(self, call: Any, make: Any, output: Any) -> Any:
            def small(claim: Claim) -> Any:
                return made(self, call, output)
            return super().once(call, small, output)

    tools = Small(settings)
    tools.__dict__["bank"] = SimpleNamespace(digest="b" * 64)
    return tools


class Promised:
    """Pools that carry a batch out when it is asked about, by the real worker flows, and say that it took as long as nothing."""

    def __init__(self) -> None:
        self._sent: list[tuple[str, Mapping[str, Any]]] = []
        self.core_s = 0.0

    def send(self, flow: str, parameters: Mapping[str, Any]) -> str:
        self._sent.append((flow, parameters))
        return str(len(self._sent) - 1)

    def ended(self, run: str) -> Any:
        from flows.batches import Ended
        from flows.preparing import preparing
        from flows.training import training

        flow, parameters = self._sent[int(run)]
        began = time.process_time()
        (preparing if flow == "preparing" else training).fn(**parameters)
        self.core_s += time.process_time() - began
        return Ended(True, "Completed")

    def cancel(self, run: str) -> None:
        """Nothing is under way."""


@contextmanager
def _without_prefect() -> Iterator[None]:
    """Tasks are the functions that they were made of, and artifacts are not made."""
    from flows import personalize, training

    stages = ("ingest_photos", "crop_portraits", "caption_portraits", "assemble_training_set", "train", "sample_battery", "judge_samples", "register_release")

    def bare(task: Any) -> Any:
        call: Callable[..., Any] = task.fn
        return type("Bare", (SimpleNamespace,), {"__call__": lambda self, *given: call(*given)})(fn=call)

    with patch.multiple(personalize, **{name: bare(getattr(personalize, name)) for name in stages},
                        **{f"create_{kind}_artifact": lambda **_: None for kind in ("markdown", "progress", "table")}), \
            patch.multiple(training, train=bare(training.train), sample_battery=bare(training.sample_battery)):
        yield


def night(settings: Settings, count: int) -> dict[str, float]:
    """One night over `count` new subjects, in a home of its own; core-seconds."""
    from flows.batches import Batches
    from flows.nightly import _what_counts, _why_not
    from flows.personalize import advance
    from flows.turns import Due, next_turns
    from likeness.night import Outcome, enrolled
    from likeness.records import Consent, Enrolment, Subject
    from tasks import runtime

    home = Path(tempfile.mkdtemp(prefix="bench-night-", dir=settings.home))
    tools = small_tools(settings.model_copy(update={"home": home}))
    tools.__dict__.update({name: getattr(WARM, name) for name in ("faces", "slots_digest", "base_ref")})
    runtime.configure(tools)
    (home / "photos").mkdir()
    for n in range(PHOTOS):
        (home / "photos" / f"{n}.jpg").write_bytes(bytes([n]) * 1000)
    for n in range(count):
        tools.enrol(Enrolment(subject=Subject(id=f"subject-{n:05d}", noun="man", consent=Consent(source="bench")), source=str(home / "photos")))
    pools, tonight, deferred = Promised(), dict[str, Outcome](), list[str]()
    began, wall = time.process_time(), time.monotonic()
    counts = _what_counts(tools)
    due: list[Due] = [(s, None, _why_not(tools, s, None, counts)[1]) for s in enrolled(tools.store)]
    asked = time.process_time() - began
    Batches(tools, "bench", tonight, pools, advance.fn, pause=lambda seconds: None).run(
        next_turns(tools, "bench", due, tonight, deferred, limit=None, ends=None))
    total = time.process_time() - began
    shutil.rmtree(home)
    if (kinds := [o.kind for o in tonight.values()]) != ["accepted"] * count:
        raise SystemExit(f"of {count} subjects {kinds.count('accepted')} were accepted: these numbers would be of another night")
    return {"subjects": count, "core_s": total, "due_s": asked, "workers_s": pools.core_s, "orchestration_s": total - pools.core_s,
            "each_s": (total - pools.core_s) / count, "share": (total - pools.core_s) / count / GPU_JOB_S, "wall_s": time.monotonic() - wall}


WARM: Any = None


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.night", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000], help="subjects of each night")
    p.add_argument("--out", type=Path, default=Path("bench-results/night"))
    args = p.parse_args()
    global WARM
    home = Path(tempfile.mkdtemp(prefix="likeness-bench-"))
    try:
        settings = load_settings(overrides={"home": str(home), "night.batch": BATCH})
        keep_to_home(home)
        from tasks.runtime import Tools

        WARM = Tools(settings)
        assert WARM.faces and WARM.slots_digest and WARM.base_ref               # loaded before the clock runs
        rows: list[dict[str, float]] = []
        with _without_prefect():
            night(settings, 2)                                                     # imports
            for n in args.counts:
                rows.append(night(settings, n))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "numbers.json").write_text(json.dumps({"gpu_job_s": GPU_JOB_S, "batch": BATCH, "nights": rows}, indent=1) + "\n")
    table = Table("subjects", "core-s each", "of that due?", "share of a 60 s GPU job", "worker flows, core-s each", "wall s")
    for row in rows:
        table.add_row(str(row["subjects"]), f"{row['each_s']:.3f}", f"{row['due_s'] / row['subjects']:.3f}", f"{row['share']:.2%}",
                      f"{row['workers_s'] / row['subjects']:.3f}", f"{row['wall_s']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
