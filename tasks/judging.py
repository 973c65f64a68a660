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
def judge_samples(subject: str, training_set: StageRef, samples: StageRef, more: StageRef | None = None, first: StageRef | None = None) -> Outcome:
    """Measure the samples against witnesses, bank and training crops, and decide; or, with `more` and the `first` judgement, look at what was drawn besides: it may be delivered."""
    tools = runtime()
    policy, people = tools.settings.gate, tools.open(training_set, subject, TrainingSet)
    base = tools.base_scores(people.noun, measure=policy.min_editability_share > 0 or policy.min_diversity_share > 0)
    second = None if tools.second_bank is None else {"bank": tools.second_bank.digest, "backend": tools.second_bank.backend}
    call = Call(stage="judge", subject=subject, inputs=(training_set, samples, *(ref for ref in (more, first) if ref is not None)),
                params={"policy": policy.plain(), "bank": tools.bank.digest, "backend": tools.faces.recogniser_name, "slots": tools.slots_digest,
                        "usual": findings.table_digest(), "base": tools.base_ref.revision, "base_scores": None if base is None else base.digest, "second": second,
                        "unsafe": {"network": tools.unsafe.name, "limit": unsafe.LIMIT}})

    def make(claim: Claim) -> Judgement:
        drawn = tools.open(samples, subject, SampleSet)
        if more is None or first is None:
            return judgement(tools, people, drawn, base, claim)
        return judged_with_more(tools, people, drawn, tools.open(more, subject, SampleSet), tools.open(first, subject, Judgement), claim)

    return tools.once(call, make, Judgement)


def judgement(tools: Tools, training_set: TrainingSet, samples: SampleSet, base: BaseScores | None, claim: Claim | None = None) -> Judgement:
    """Measure and decide; `base` is what the base alone does on the same battery."""
    eyes = _Eyes(tools, training_set)
    seen = eyes.look([*samples.samples, *samples.bare], claim)
    decide = len(samples.samples)
    measured = measure.measure(seen[:decide], eyes.references(base), bare=seen[decide:])
    return Judgement(verdict=gate.judge(measured, tools.settings.gate), measured=measured)


def judged_with_more(tools: Tools, training_set: TrainingSet, samples: SampleSet, more: SampleSet, first: Judgement, claim: Claim | None = None) -> Judgement:
    """The first judgement, word for word and number for number, and what was drawn besides: only what is delivered differs."""
    eyes = _Eyes(tools, training_set)
    seen = eyes.look(more.samples, claim)
    small = [measure.thumbnail(pictures.get(tools.store, s.image)) for s in samples.samples]
    measured = measure.with_more(first.measured, small, seen, eyes.references(first.measured.base))
    return Judgement(verdict=gate.judge(measured, tools.settings.gate), measured=measured)


def drawn_besides(tools: Tools, subject: str, judged: StageRef) -> tuple[Sample, ...]:
    """Samples that a judgement looked at for delivery only; none where none were drawn."""
    drawn = [ref for ref in tools.published(judged, subject).inputs if ref.stage == "sample"]
    return tuple(s for ref in drawn[1:] for s in tools.open(ref, subject, SampleSet).samples)


class _Eyes:
    """Who looks at a subject's samples, and what they are held against."""

    def __init__(self, tools: Tools, training_set: TrainingSet) -> None:
        self.tools, self.training_set = tools, training_set
        portraits = [*training_set.portraits, *training_set.held_out]
        self.people = [p for p in portraits if p.framing == "tight"]          # one vector a photo: its wide crop has the same
        self.crops = {p.digest: pictures.get(tools.store, p.crop) for p in portraits}

    def look(self, drawn: Sequence[Sample], claim: Claim | None) -> list[measure.Seen]:
        """Every picture as the networks see it."""
        tools, seen = self.tools, list[measure.Seen]()
        looker = Looker(tools.faces, tools.slots, findings.usual([self.crops[p.digest] for p in self.people], base=tools.base_ref.revision), tools.unsafe)
        tell = tools.progress("judge", len(drawn))
        for number, sample in enumerate(drawn):
            seen.append(looker.see(pictures.get(tools.store, sample.image), name=sample.image.sha256, category=sample.category, slots=sample.slots))
            tell(number + 1, "")
            if claim is not None and number % 8 == 0:
                claim.beat(f"looked at {number + 1} of {len(drawn)} samples")
        return seen

    def references(self, base: BaseScores | None) -> measure.References:
        """Witnesses, own portraits, bank and training crops."""
        tools, witnesses = self.tools, self.training_set.held_out
        first = measure.Identity(tools.faces.recogniser_name, tools.bank.digest, _vectors(witnesses), _vectors(self.people), tools.bank.embeddings)
        second = _second_opinion(tools, [self.crops[p.digest] for p in witnesses], [self.crops[p.digest] for p in self.people])
        return measure.References(first, np.stack([measure.thumbnail(crop) for crop in self.crops.values()]), base=base, second=second)


def _vectors(portraits: Sequence[Portrait]) -> measure.Vectors:
    return np.asarray([p.embedding for p in portraits], np.float32)


def _second_opinion(tools: Tools, witnesses: Sequence[NDArray[np.uint8]], own: Sequence[NDArray[np.uint8]]) -> measure.Identity | None:
    """The same people as the second recogniser sees them, on their aligned crops, as it sees the bank's; None where one alone votes."""
    second, bank = tools.faces.second, tools.second_bank
    if second is None or bank is None:
        return None
    return measure.Identity(second.recogniser_name, bank.digest, second.embed_portraits(witnesses), second.embed_portraits(own), bank.embeddings)
