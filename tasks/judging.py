"""judge: what the samples show is measured, and the gate decides."""

from __future__ import annotations

import numpy as np
from prefect import task

from likeness import gate
from likeness.once import Claim
from likeness.records import Measurements, Record, SampleSet, TrainingSet, Verdict
from likeness.stages import Call, StageRef
from models.quality import findings, measure
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime


class Judgement(Record):
    """The output of `judge`: the Verdict, and every number it was made from."""

    verdict: Verdict
    measured: Measurements


@task(name="judge", task_run_name="judge {subject}", **RETRIED)
def judge_samples(subject: str, training_set: StageRef, samples: StageRef) -> Outcome:
    """Measure the samples against witnesses, bank and training crops, and decide."""
    tools = runtime()
    policy = tools.settings.gate
    call = Call(stage="judge", subject=subject, inputs=(training_set, samples),
                params={"policy": policy.plain(), "bank": tools.bank.digest, "backend": tools.faces.recogniser_name, "slots": tools.slots_digest,
                        "usual": findings.table_digest(), "base": tools.base_ref.revision})
    return tools.once(call, lambda claim: judgement(tools, tools.open(training_set, subject, TrainingSet), tools.open(samples, subject, SampleSet), claim), Judgement)


def judgement(tools: Tools, training_set: TrainingSet, samples: SampleSet, claim: Claim | None = None) -> Judgement:
    """Measure and decide; the controls of the gate call this directly."""
    tell = tools.progress("judge", len(samples.samples))
    portraits = [*training_set.portraits, *training_set.held_out]
    people = [p for p in portraits if p.framing == "tight"]          # one vector a photo: its wide crop has the same
    crops = {p.digest: pictures.get(tools.store, p.crop) for p in portraits}
    usual = findings.usual([crops[p.digest] for p in people], base=tools.base_ref.revision)
    seen = []
    for number, sample in enumerate(samples.samples):
        image = pictures.get(tools.store, sample.image)
        faces = tools.faces.find_faces(image)
        vector = tools.faces.embed_faces(image, faces)[0] if len(faces) == 1 else None
        right, asked = measure.slots_seen(sample.slots, tools.slots.read(image[None])[0]) if sample.slots else (0, 0)
        defects = findings.find_defects(image, faces, usual, stylised=sample.category == gate.STYLISED)
        seen.append(measure.Seen(sample.image.sha256, sample.category, len(faces), vector, measure.thumbnail(image), defects, right, asked))
        tell(number + 1, "")
        if claim is not None and number % 8 == 0:
            claim.beat(f"looked at {number + 1} of {len(samples.samples)} samples")
    references = measure.References(
        witnesses=np.asarray([p.embedding for p in training_set.held_out], np.float32), own=np.asarray([p.embedding for p in people], np.float32),
        impostors=tools.bank.embeddings, training=np.stack([measure.thumbnail(crops[p.digest]) for p in portraits]))
    measured = measure.measure(seen, references, backend=tools.faces.recogniser_name, bank=tools.bank.digest)
    return Judgement(verdict=gate.judge(measured, tools.settings.gate), measured=measured)
