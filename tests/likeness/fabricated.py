"""A whole chain of one subject, fabricated: small bytes where pictures and weights would be, everything else as the stages publish it.

Run as a program it registers that chain once, from its own process: `python -m tests.likeness.fabricated STORE TRACKING_URI ARTIFACTS`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likeness import digest
from likeness.dossier import Dossier
from likeness.once import ClaimPolicy, once
from likeness.recipe import Lora
from likeness.records import (
    Adapter,
    BaseRef,
    Caption,
    Consent,
    Curve,
    FaceMeasures,
    Intake,
    Photo,
    PhotoJudgement,
    Portrait,
    Reason,
    Release,
    Sample,
    SampleSet,
    SetJudgement,
    Subject,
    TrainingSet,
    Verdict,
)
from likeness.registry import Registry
from likeness.stages import Call, Published
from likeness.store import LocalStore, Store, put_blob

BASE = BaseRef(name="maquette", family="sd15", resolution_px=128, prediction="v_prediction", licence="Apache-2.0", revision="1",
               files={"unet/diffusion_pytorch_model.safetensors": "a" * 64, "vae/config.json": "b" * 64})
CLAIMS = ClaimPolicy(ttl_s=2.0, wait_s=60.0)


@dataclass(frozen=True)
class World:
    store: Store
    subject: Subject
    intake: Intake
    training_set: TrainingSet
    recipe: Lora
    adapter: Adapter
    samples: SampleSet
    verdict: Verdict
    weights: bytes
    published: dict[str, Published]

    def dossier(self, **changes: Any) -> Dossier:
        fields: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("subject", "training_set", "recipe", "adapter", "samples", "verdict", "weights")},
            "photos": self.intake.photos, "base": BASE, "stages": tuple(p.ref for p in self.published.values()),
            "lineage": {"subject": self.subject.id}, "report_html": "<!doctype html><title>report</title>", "samples_png": b"\x89PNG",
            "seconds": {"train": 1.5}, "code": "0.1.0+g" + "c" * 40}
        return Dossier(**(fields | changes))

    def register_call(self) -> Call:
        return Call(stage="register", subject=self.subject.id, inputs=(self.published["train"].ref, self.published["judge"].ref),
                    params={"recipe": self.recipe.digest})


def publish(store: Store, call: Call, output: dict[str, Any]) -> Published:
    made = Published(stage=call.stage, epoch=call.epoch, key=call.key, inputs=call.inputs, params=call.params, output=output,
                     digest=digest.of_json(output))
    assert store.put_if_absent(call.path, json.dumps(made.model_dump(mode="json"), sort_keys=True).encode())
    return made


def build(store: Store, *, subject: str = "ada", recipe: Lora | None = None, photos: int = 3, weights: bytes = b"weights", policy: str = "d" * 64,
          curve: Curve | None = None) -> World:
    """Publish ingest to judge."""
    recipe = recipe or Lora()
    who, home = Subject(id=subject, noun="woman", consent=Consent(source="operator")), f"subjects/{subject}"

    def blob(kind: str, what: str, media: str = "image/png") -> Any:
        return put_blob(store, f"{home}/{kind}", f"{subject} {what}".encode(), media=media)

    pictures = []
    for i in range(photos):
        ref = blob("photos", f"photo {i}")
        pictures.append(Photo(sha256=ref.sha256, source_sha256=digest.of_bytes(f"{subject} source {i}".encode()), blob=ref, width_px=512, height_px=512))
    intake = Intake(photos=tuple(pictures), set=SetJudgement(verdict="ok", reason=None, message="enough"),
                    judgements=tuple(PhotoJudgement(name=f"{i}.jpg", verdict="accept", reason=None, message="used") for i in range(photos)))
    face = FaceMeasures(box_px=(10.0, 10.0, 90.0, 90.0), eye_distance_px=30.0, roll_deg=0.5, sharpness=12.0, score=1.0, visible=1.0)
    portraits = tuple(Portrait(photo=p.sha256, crop=blob("portraits", f"crop {i}"), mask=blob("portraits", f"mask {i}"), side_px=128,
                               framing="tight", face=face, embedding=(0.1, 0.2)) for i, p in enumerate(pictures))
    captions = tuple(Caption(portrait=p.digest, text=f"a photo, number {i}", source="slots") for i, p in enumerate(portraits))
    training = TrainingSet(subject=who.digest, trigger="sks", noun="woman", portraits=portraits[:-1], captions=captions[:-1], held_out=portraits[-1:])
    adapter = Adapter(training_set=training.digest, recipe=recipe.digest, base=BASE.digest, losses=((10, 0.5), (20, 0.25)), steps=20, curve=curve,
                      weights=put_blob(store, f"{home}/adapters", weights, media="application/vnd.safetensors"))
    sample = Sample(adapter=adapter.digest, prompt="a painting of sks woman", category="style", seed=7, image=blob("samples", "sample 0"))
    samples = SampleSet(adapter=adapter.digest, battery="e" * 64, samples=(sample,))
    verdict = Verdict(kind="accepted", reasons=(Reason(code="good", message="all tests passed"),), scores={"identity": 0.8, "copies": None},
                      measured="f" * 64, policy=policy, delivered=(sample.image.sha256,))

    done: dict[str, Published] = {}

    def stage(name: Any, inputs: tuple[str, ...], output: Any, **params: Any) -> None:
        call = Call(stage=name, subject=subject, inputs=tuple(done[i].ref for i in inputs), params=params)
        done[name] = publish(store, call, output if isinstance(output, dict) else output.plain())

    stage("ingest", (), intake, sources=[p.source_sha256 for p in pictures])
    stage("crop", ("ingest",), {"portraits": [p.plain() for p in portraits]}, side_px=128)
    stage("caption", ("crop",), {"captions": [c.plain() for c in captions]})
    stage("assemble", ("crop", "caption"), training, subject=who.digest)
    stage("train", ("assemble",), adapter, recipe=recipe.plain(), base=BASE.digest)
    stage("sample", ("train",), samples, battery="e" * 64, base=BASE.digest)
    stage("judge", ("assemble", "sample"), {"verdict": verdict.plain(), "measured": 0.5}, policy=policy)
    return World(store, who, intake, training, recipe, adapter, samples, verdict, weights, done)


def register_once(world: World, registry: Registry) -> Release:
    """As the flow does it: the Store's claim decides, the registry converges."""
    return once(world.store, world.register_call(), lambda claim: registry.register(world.dossier(), check=claim.check), output=Release,
                claims=CLAIMS).record


if __name__ == "__main__":
    store_path, uri, artifacts = sys.argv[1:4]
    from likeness.store import MemoryStore
    world = build(MemoryStore())                                   # the same content: what counts is the claim in the shared store
    shared = World(LocalStore(Path(store_path)), *[getattr(world, name) for name in list(World.__dataclass_fields__)[1:]])
    registry = Registry(uri, Path(artifacts))
    registry.client.search_experiments()
    print("ready", flush=True)
    sys.stdin.readline()                                           # both start at the same moment
    print(register_once(shared, registry).plain(), flush=True)
