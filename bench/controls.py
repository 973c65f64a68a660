"""Controls of the gate: samples that must be refused, each for its own reason, and samples that must not: `make bench-gate BENCH_ARGS=--controls`.

Subjects are rendered users that the maquette never saw: eight photos to train on, the next two are witnesses, the rest is unseen. What no training is needed for is asked
of every user; adapters are trained, as cells, of as many as `--adapters` says: an honest one with the product's recipe, and, with `--overfit`, one with four times the steps and no prior.

| control | samples | refused for |
|---|---|---|
| noise | uniform noise | faces |
| copier | the training portraits, and slight edits of them | copies |
| other | unseen photos of the next user of the class noun: the best that an adapter of theirs could draw | identity |
| zero steps | what the base draws for a trigger that it never learnt | identity |
| collapsed | one unseen photo over and over, a little lighter or darker each time | diversity |
| drifted | unseen photos, and the same for the class noun alone | drift |
| deaf | unseen photos as answers to the battery's prompts, whose details they show by chance only | editability |
| other's adapter | samples of the other honest adapters of the class noun | identity |
| overfitted | samples of the overfitted adapter | anything: the reasons are shown |
| *unseen photos* | of the user, strangers for the class noun | must be accepted |
| *honest* | samples of the honest adapter | reported |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from tqdm import tqdm

from bench.cells import Arrays
from bench.drawing import Bench, bytes_digest
from bench.personalisation import TRAIN_PHOTOS, read_nouns, read_photos
from likeness import gate
from likeness.gate import judge
from likeness.recipe import RECIPE, Recipe
from likeness.records import Verdict
from likeness.settings import Settings
from likeness.stages import fingerprint
from models.captions.slots import SlotReader, subject_captions
from models.diffusion import bases
from models.diffusion.batches import encode
from models.diffusion.methods import adapted, as_file, train
from models.diffusion.sampler import sample
from models.faces.face import Face, Picture, Vectors
from models.maquette.companions import read_bank, read_base_scores, read_class_pictures
from models.quality import findings, looking, measure, unsafe
from models.quality.looking import Looker
from models.quality.unsafe import OpenNsfw

EPOCH = 2              # raise it when the code of this file changes what an adapter or a sample is
WITNESSES = 2
DRIFT = 0.25          # share that the control "drifted" is held to: the policy asks nothing
ZERO_SETS = 2         # different sets of samples by the base alone, for each class noun

RIGHT: Mapping[str, frozenset[str]] = {      # for what each must be refused; other reasons may stand beside it
    "noise": frozenset({"faces"}), "copier": frozenset({"copies"}), "other": frozenset({"identity"}), "zero steps": frozenset({"identity"}), "collapsed": frozenset({"diversity"}),
    "drifted": frozenset({"drift"}), "deaf": frozenset({"editability"}), "other's adapter": frozenset({"identity"}), "unseen photos": frozenset({"accepted"}),
}


@dataclass(frozen=True)
class Subject:
    """One rendered user: aligned crops (P, S, S, 3) and embeddings (P, D) of all usable photos: trained on, witnesses, unseen, in this order."""

    name: str
    noun: str
    crops: NDArray[np.uint8]
    vectors: NDArray[np.float32]

    @property
    def unseen(self) -> list[Picture]:
        return list(self.crops[TRAIN_PHOTOS + WITNESSES:])


@dataclass(frozen=True)
class Drawn:
    """Samples to judge: pictures with category and slots of their prompts, and those of the class noun alone."""

    pictures: Sequence[Picture]
    bare: Sequence[Picture]
    prompts: Sequence[tuple[str, Mapping[str, str]]] = ()        # plain, without slots, where empty


class Remembering:
    """A detector or recogniser that looks at a picture once: controls show the same ones many times."""

    def __init__(self, network: Any) -> None:
        self._network, self._found = network, dict[tuple[str, str], Any]()
        self.name, self.licence = network.name, network.licence
        self.metric, self.same_person_distance = getattr(network, "metric", None), getattr(network, "same_person_distance", None)

    def find_faces(self, picture: Picture) -> list[Face]:
        """As the network does."""
        return list(self._once(picture, "", lambda: self._network.find_faces(picture)))

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """As the network does."""
        return np.asarray(self._once(picture, str([f.box_px for f in faces]), lambda: self._network.embed_faces(picture, faces)))

    def _once(self, picture: Picture, what: str, look: Callable[[], Any]) -> Any:
        key = (bytes_digest(picture), what)
        if key not in self._found:
            self._found[key] = look()
        return self._found[key]


class Controls:
    """All controls over one set of users."""

    def __init__(self, bench: Bench, settings: Settings, folder: Path, *, limit: int | None = None) -> None:
        self.bench, self.settings = bench, settings
        self.faces = replace(bench.faces, detector=Remembering(bench.faces.detector), embedder=Remembering(bench.faces.embedder))
        self.reader, self.safety = SlotReader.load(bases.MAQUETTE / "weights" / "clip"), OpenNsfw()
        subjects = []
        for place, noun in tqdm(read_nouns(folder)[:limit], desc="users", unit="user", disable=None):
            seen = read_photos(bench, place)
            if len(seen["crops"]) >= TRAIN_PHOTOS + WITNESSES + 4:
                subjects.append(Subject(place.name, noun, seen["crops"], seen["vectors"]))
        self.subjects = subjects
        self.strangers = {noun: list(read_class_pictures(noun, side_px=bench.base.ref.resolution_px)[0]) for noun in {s.noun for s in subjects}}

    # -- what is judged

    def zero_steps(self, subject: Subject) -> Drawn:
        """What the base draws for a trigger that it never learnt, by seeds that its own scores were not measured on."""
        return self.drawn(subject.noun, None, first_seed=100 * (1 + self.subjects.index(subject) % ZERO_SETS))

    def judged(self, subject: Subject, drawn: Drawn, *, max_drift_share: float | None = None) -> Verdict:
        """By the product's own eyes and gate; drift is asked about where a share of it is given, as it is not by default."""
        faces, bank = self.faces, read_bank()
        trained = TRAIN_PHOTOS + WITNESSES
        looker = Looker(faces, self.reader, findings.usual(list(subject.crops[:trained]), base=self.bench.base.ref.revision), self.safety)
        prompts = drawn.prompts or [("plain", {})] * len(drawn.pictures)
        seen = [looker.see(p, name=f"{n:064x}", category=category, slots=slots) for n, (p, (category, slots)) in enumerate(zip(drawn.pictures, prompts, strict=True))]
        bare = [looker.see(p, name=f"{n:063x}b", category="bare", slots={}) for n, p in enumerate(drawn.bare)]
        base = read_base_scores(subject.noun, revision=self.bench.base.ref.revision, battery=self.settings.battery.digest, sampling=self.settings.sampling)
        references = measure.References(
            measure.Identity(faces.recogniser_name, bank.digest, subject.vectors[TRAIN_PHOTOS:trained], subject.vectors[:trained], bank.embeddings),
            np.stack([measure.thumbnail(c) for c in subject.crops[:trained]]), base=base)
        policy = self.settings.gate if max_drift_share is None else self.settings.gate.model_copy(update={"max_drift_share": max_drift_share})
        return judge(measure.measure(seen, references, bare=bare), policy)

    def untrained(self, subject: Subject) -> dict[str, Drawn]:
        """Controls that need no training; `unseen photos` must pass."""
        rng, side = np.random.default_rng(int(subject.name)), subject.crops.shape[1]
        every, bare = self.strangers[subject.noun], self.settings.sampling.bare
        start = bare * self.subjects.index(subject) % (len(every) - bare)
        four = every[start:start + bare]
        training, unseen = list(subject.crops[:TRAIN_PHOTOS]), subject.unseen
        found = {
            "noise": Drawn([rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(12)], four),
            "copier": Drawn([*training, *(_edited(c, 6 + i) for i, c in enumerate(training))], four),
            "collapsed": Drawn([_edited(unseen[0], i - 6) for i in range(12)], four),
            "drifted": Drawn(_repeated(unseen), unseen[:4]),
            "deaf": Drawn(_repeated(unseen, 16), four, [(p.category, p.slots) for p, _ in self.settings.battery.every()]),
            "unseen photos": Drawn(_repeated(unseen), four),
        }
        following = self.following(subject)
        if following is not None:
            found["other"] = Drawn(_repeated(following.unseen), four)
        return found

    def following(self, subject: Subject) -> Subject | None:
        """The next user of the class noun, after the last the first; None if there is no other."""
        others = [s for s in self.subjects if s.noun == subject.noun and s.name != subject.name]
        return next((s for s in others if s.name > subject.name), others[0]) if others else None

    def kept_untrained(self, subject: Subject) -> dict[str, dict[str, Any]]:
        """Verdicts of `untrained`, a cell for each user: kind, codes of the reasons, scores."""
        sources = {f.name: fingerprint(f.read_text(encoding="utf-8")) for f in (Path(m.__file__) for m in (findings, measure, looking, unsafe, gate))}
        following = self.following(subject)
        depends = {"epoch": EPOCH, "user": bytes_digest(subject.crops), "other": bytes_digest(following.crops) if following else None,
                   "strangers": self.subjects.index(subject), "policy": self.settings.gate.digest, "battery": self.settings.battery.digest,
                   "base": self.bench.base.ref.revision, "backend": self.faces.recogniser_name, "table": findings.table_digest(), **sources}
        return dict(self.bench.cells.numbers("control-verdicts", depends, lambda: {
            name: _row(self.judged(subject, drawn, max_drift_share=DRIFT if name == "drifted" else None)) for name, drawn in self.untrained(subject).items()}))

    # -- adapters

    def recipe(self, kind: str) -> Recipe:
        """The product's own, or one that goes too far on purpose: four times the steps, no prior."""
        recipe = self.settings.recipe
        if kind == "honest":
            return recipe
        plain = recipe.plain()
        return RECIPE.validate_python({**plain, "steps": 4 * recipe.steps, "objective": {**plain["objective"], "prior_weight": 0.0}}, strict=False)

    def adapter(self, subject: Subject, kind: str) -> Arrays:
        """Tensors of an adapter of this user, trained now if they are not kept."""
        recipe, base, crops = self.recipe(kind), self.bench.base, subject.crops[:TRAIN_PHOTOS]

        def make() -> Arrays:
            captions = [text for text, _, _ in subject_captions(self.reader, crops, [None] * len(crops), who=f"{base.trigger} {subject.noun}")]
            images, words = read_class_pictures(subject.noun, side_px=base.ref.resolution_px) if recipe.objective.wants_class_pictures or recipe.decoder_steps else (crops[:0], [])
            inputs = encode(base, crops_NSSC=crops, masks_NSS=np.stack([self.bench.faces.face_mask(c) for c in crops]), captions=captions,
                            class_images_MSSC=images, class_captions=words, noun=subject.noun)
            result = train(subject.name, base, inputs, recipe)
            if result.error is not None:
                raise result.error
            return {key: tensor.numpy() for key, tensor in as_file(result.tensors).items()}

        return self.bench.cells.arrays("adapter", {"epoch": EPOCH, "base": base.ref.revision, "recipe": recipe.digest, "user": bytes_digest(crops)}, make)

    def drawn(self, noun: str, adapter: tuple[Arrays, Recipe] | None, *, first_seed: int = 0) -> Drawn:
        """The battery and the class noun alone, with an adapter or, for None, by the base that never heard of the trigger.

        Seeds are those of the battery, which the base's own scores were measured on too, or with `first_seed` others.
        """
        import torch

        base, sampling, every = self.bench.base, self.settings.sampling, self.settings.battery.every()
        texts = [p.text(f"{base.trigger} {noun}") for p, _ in every] + [f"a photo of a {noun}"] * sampling.bare
        seeds = [first_seed + s for _, s in every] + list(range(first_seed, first_seed + sampling.bare))

        def make() -> Arrays:
            if adapter is None:
                return {"images": sample(base, texts, seeds, steps=sampling.steps, guidance=sampling.guidance, batch=sampling.batch)}
            tensors = {key: torch.from_numpy(array) for key, array in adapter[0].items()}
            with adapted(base, tensors, adapter[1]):
                return {"images": sample(base, texts, seeds, steps=sampling.steps, guidance=sampling.guidance, batch=sampling.batch)}

        weights = None if adapter is None else {key: bytes_digest(array) for key, array in adapter[0].items()}
        images = self.bench.cells.arrays("control-samples", {"epoch": EPOCH, "base": base.ref.revision, "adapter": weights, "texts": texts, "seeds": seeds,
                                                             "steps": sampling.steps, "guidance": sampling.guidance}, make)["images"]
        return Drawn(list(images[:len(every)]), list(images[len(every):]), [(p.category, p.slots) for p, _ in every])


def _edited(picture: Picture, by: int) -> Picture:
    """A little lighter or darker, a pixel shifted."""
    return np.clip(np.roll(picture, by % 3 - 1, axis=1).astype(np.int16) + by, 0, 255).astype(np.uint8)


def _repeated(pictures: Sequence[Picture], count: int = 12) -> list[Picture]:
    return [pictures[i % len(pictures)] for i in range(count)]


def run(controls: Controls, *, adapters: int, overfit: int, note: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Every control of every user: for each, how many ended as they must, of how many, every reason counted, and every verdict by who was judged as whom."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for subject in tqdm(controls.subjects, desc="controls", unit="user", disable=None):
        for name, found in controls.kept_untrained(subject).items():
            rows.setdefault(name, {})[subject.name] = found
    for subject in tqdm(controls.subjects, desc="zero steps", unit="user", disable=None):
        rows.setdefault("zero steps", {})[subject.name] = _row(controls.judged(subject, controls.zero_steps(subject)))
    made: list[tuple[Subject, Drawn]] = []
    for subject in controls.subjects[:adapters]:
        note(f"honest adapter of {subject.name}")
        made.append((subject, controls.drawn(subject.noun, (controls.adapter(subject, "honest"), controls.recipe("honest")))))
        rows.setdefault("honest", {})[subject.name] = _row(controls.judged(*made[-1]))
    for subject, _ in made:
        for other, drawn in made:
            if other.name != subject.name and other.noun == subject.noun:
                rows.setdefault("other's adapter", {})[f"{other.name} as {subject.name}"] = _row(controls.judged(subject, drawn))
    for subject in controls.subjects[:overfit]:
        note(f"overfitted adapter of {subject.name}")
        drawn = controls.drawn(subject.noun, (controls.adapter(subject, "overfitted"), controls.recipe("overfitted")))
        rows.setdefault("overfitted", {})[subject.name] = _row(controls.judged(subject, drawn))
    return {name: {"right": sum(ended_right(name, v) for v in found.values()), "of": len(found), "reasons": dict(Counter(code for v in found.values() for code in v["reasons"])),
                   "verdicts": found} for name, found in rows.items()}


def _row(verdict: Verdict) -> dict[str, Any]:
    return {"kind": verdict.kind, "reasons": [r.code for r in verdict.reasons], "scores": dict(verdict.scores)}


def ended_right(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a control ended as it must: with its own reason among the reasons, accepted where that is right, or, where no reason is named, anyhow but accepted."""
    if name == "honest":
        return bool(found["kind"] == "accepted")
    return RIGHT[name] <= {*found["reasons"]} if name in RIGHT else bool(found["kind"] != "accepted")


def printed(results: Mapping[str, Any]) -> Table:
    """What is shown."""
    table = Table("samples", "must be", "as it must", "reasons", title="controls of the gate")
    for name, row in results.items():
        wanted = "accepted (reported)" if name == "honest" else ", ".join(sorted(RIGHT.get(name, {"refused"})))
        table.add_row(name, wanted, f"{row['right']} of {row['of']}", ", ".join(f"{code} {n}" for code, n in row["reasons"].items()))
    return table
