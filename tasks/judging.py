"""judge: what the samples show is measured, and the gate decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from prefect import task

from likeness import gate
from likeness.once import Claim
from likeness.records import BaseScores, Measurements, Portrait, Record, Sample, SampleSet, TrainingSet, Verdict
from likeness.stages import Call, StageRef
from models.quality import findings, measure, unsafe
from models.quality.looking import Looker
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime


class Judgement(Record):
    """The output of `judge`: the Verdict, and every number it was made from."""

    verdict: Verdict
    measured: Measurements


@task(name="judge", task_run_name="judge {subject}", **RETRIED)
def judge_samples(subject: str, training_set: StageRef, samples: StageRef, more: StageRef | None = None) -> Outcome:
    """Measure the samples against witnesses, bank and training crops, and decide; `more` were drawn besides and may be delivered."""
    tools = runtime()
    policy, people = tools.settings.gate, tools.open(training_set, subject, TrainingSet)
    base = tools.base_scores(people.noun, measure=policy.min_editability_share > 0 or policy.min_diversity_share > 0)
    second = None if tools.second_bank is None else {"bank": tools.second_bank.digest, "backend": tools.second_bank.backend}
    call = Call(stage="judge", subject=subject, inputs=(training_set, samples, *([more] if more else ())),
                params={"policy": policy.plain(), "bank": tools.bank.digest, "backend": tools.faces.recogniser_name, "slots": tools.slots_digest,
                        "usual": findings.table_digest(), "base": tools.base_ref.revision, "base_scores": None if base is None else base.digest, "second": second,
                        "unsafe": {"network": tools.unsafe.name, "limit": unsafe.LIMIT}})
    return tools.once(call, lambda claim: judgement(tools, people, tools.open(samples, subject, SampleSet), base, claim,
                                                      more=tools.open(more, subject, SampleSet) if more else None), Judgement)


def drawn_besides(tools: Tools, subject: str, judged: StageRef) -> tuple[Sample, ...]:
    """Samples that a judgement looked at for delivery only; none where none were drawn."""
    return tuple(s for ref in tools.published(judged, subject).inputs[2:] for s in tools.open(ref, subject, SampleSet).samples)


def judgement(tools: Tools, training_set: TrainingSet, samples: SampleSet, base: BaseScores | None, claim: Claim | None = None, *, more: SampleSet | None = None) -> Judgement:
    """Measure and decide; `base` is what the base alone does on the same battery, `more` decide nothing and may be delivered."""
    besides = () if more is None else more.samples
    drawn = [*samples.samples, *samples.bare, *besides]
    tell = tools.progress("judge", len(drawn))
    portraits = [*training_set.portraits, *training_set.held_out]
    people = [p for p in portraits if p.framing == "tight"]          # one vector a photo: its wide crop has the same
    crops = {p.digest: pictures.get(tools.store, p.crop) for p in portraits}
    looker = Looker(tools.faces, tools.slots, findings.usual([crops[p.digest] for p in people], base=tools.base_ref.revision), tools.unsafe)
    seen = []
    for number, sample in enumerate(drawn):
        seen.append(looker.see(pictures.get(tools.store, sample.image), name=sample.image.sha256, category=sample.category, slots=sample.slots))
        tell(number + 1, "")
        if claim is not None and number % 8 == 0:
            claim.beat(f"looked at {number + 1} of {len(drawn)} samples")
    first = measure.Identity(tools.faces.recogniser_name, tools.bank.digest, _vectors(training_set.held_out), _vectors(people), tools.bank.embeddings)
    second = _second_opinion(tools, [crops[p.digest] for p in training_set.held_out], [crops[p.digest] for p in people])
    references = measure.References(first, np.stack([measure.thumbnail(crops[p.digest]) for p in portraits]), base=base, second=second)
    decide, alone = len(samples.samples), len(drawn) - len(besides)
    measured = measure.measure(seen[:decide], references, bare=seen[decide:alone], more=seen[alone:])
    return Judgement(verdict=gate.judge(measured, tools.settings.gate), measured=measured)


def _vectors(portraits: Sequence[Portrait]) -> measure.Vectors:
    return np.asarray([p.embedding for p in portraits], np.float32)


def _second_opinion(tools: Tools, witnesses: Sequence[NDArray[np.uint8]], own: Sequence[NDArray[np.uint8]]) -> measure.Identity | None:
    """The same people as the second recogniser sees them, on their aligned crops, as it sees the bank's; None where one alone votes."""
    second, bank = tools.faces.second, tools.second_bank
    if second is None or bank is None:
        return None
    return measure.Identity(second.recogniser_name, bank.digest, second.embed_portraits(witnesses), second.embed_portraits(own), bank.embeddings)
