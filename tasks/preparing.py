"""crop, caption, assemble: Photos become Portraits with Captions, and those a TrainingSet with its witnesses."""

from __future__ import annotations

import numpy as np
from prefect import task

from likeness.errors import UnusablePhotos
from likeness.once import Claim
from likeness.records import Caption, CaptionSet, FaceMeasures, Intake, Portrait, PortraitSet, TrainingSet
from likeness.stages import Call, StageRef
from models.captions import slots
from models.faces import align
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime


@task(name="crop", task_run_name="crop {subject}", **RETRIED)
def crop_portraits(subject: str, intake: StageRef) -> Outcome:
    """Cut an aligned Portrait with its face mask out of every accepted Photo."""
    tools = runtime()
    side_px = tools.base_ref.resolution_px
    call = Call(stage="crop", subject=subject, inputs=(intake,), params={"side_px": side_px, "backend": tools.faces.name})
    return tools.once(call, lambda claim: _crop(tools, call, tools.open(intake, subject, Intake), side_px, claim), PortraitSet)


def _crop(tools: Tools, call: Call, intake: Intake, side_px: int, claim: Claim) -> PortraitSet:
    folder = f"subjects/{call.subject}/portraits"
    tell = tools.progress(call.stage, len(intake.photos))
    portraits = []
    for number, photo in enumerate(intake.photos):
        pixels = pictures.get(tools.store, photo.blob)
        face = tools.faces.main_face(pixels)
        tell(number + 1, "")
        if face is None:
            continue
        alignment = align.fit(face.points)
        crop = align.crop(pixels, alignment, side_px=side_px)
        mask = tools.faces.face_mask(crop)
        portraits.append(Portrait(
            photo=photo.sha256, crop=pictures.put(tools.store, folder, crop), mask=pictures.put(tools.store, folder, mask), side_px=side_px, framing="tight",
            face=FaceMeasures(box_px=face.box_px, eye_distance_px=alignment.eye_distance_px, roll_deg=alignment.roll_deg, sharpness=tools.faces.sharpness(crop),
                              score=face.score, visible=align.visible_share(pixels.shape, alignment)),
            embedding=tuple(float(v) for v in tools.faces.embed_faces(pixels, [face])[0])))
        claim.beat(f"cut {number + 1} of {len(intake.photos)} photos")
    if not portraits:
        raise UnusablePhotos("no face could be cut out of any accepted photo: add photos in which the face is large and sharp")
    return PortraitSet(portraits=tuple(sorted(portraits, key=lambda p: (-p.face.visible, p.photo))))


@task(name="caption", task_run_name="caption {subject}", **RETRIED)
def caption_portraits(subject: str, intake: StageRef, portraits: StageRef, noun: str) -> Outcome:
    """Say in words what must stay editable in every Portrait; sidecar files win."""
    tools = runtime()
    trigger = tools.base_trigger
    call = Call(stage="caption", subject=subject, inputs=(intake, portraits), params={"who": f"{trigger} {noun}", "captioner": tools.settings.backends.captions,
                                                                                       "min_probability": slots.MIN_PROBABILITY, "clip": tools.slots_digest})
    return tools.once(call, lambda claim: _caption(tools, tools.open(intake, subject, Intake), tools.open(portraits, subject, PortraitSet), f"{trigger} {noun}"), CaptionSet)


def _caption(tools: Tools, intake: Intake, portraits: PortraitSet, who: str) -> CaptionSet:
    words = {photo.sha256: photo.sidecar for photo in intake.photos}
    crops = pictures.stack(tools.store, [p.crop for p in portraits.portraits])
    texts = slots.subject_captions(tools.slots, crops, [words.get(p.photo) for p in portraits.portraits], who=who)
    return CaptionSet(captions=tuple(Caption.model_validate(dict(portrait=p.digest, text=text, slots=named, source=source))
                                     for p, (text, named, source) in zip(portraits.portraits, texts, strict=True)))


@task(name="assemble", task_run_name="assemble {subject}", **RETRIED)
def assemble_training_set(subject: str, portraits: StageRef, captions: StageRef) -> Outcome:
    """Choose the witnesses and put the TrainingSet together."""
    tools = runtime()
    enrolled = tools.standing(subject).subject
    held_out = tools.settings.intake.held_out
    call = Call(stage="assemble", subject=subject, inputs=(portraits, captions), params={"held_out": held_out, "subject": enrolled.digest, "trigger": tools.base_trigger})
    return tools.once(call, lambda claim: assemble(tools.open(portraits, subject, PortraitSet), tools.open(captions, subject, CaptionSet), subject=enrolled.digest,
                                                   noun=enrolled.noun, trigger=tools.base_trigger, held_out=held_out), TrainingSet)


def assemble(portraits: PortraitSet, captions: CaptionSet, *, subject: str, noun: str, trigger: str, held_out: int) -> TrainingSet:
    """Split Portraits into trained ones and witnesses.

    Witnesses are whole photos, and those nearest to the person's centre: a witness must be a fair picture of them, since everything the
    gate says rests on it. At most a quarter of the portraits is held out, at least one.
    """
    vectors = np.asarray([p.embedding for p in portraits.portraits], np.float64)
    distance = np.linalg.norm(vectors - np.median(vectors, axis=0), axis=1)
    count = max(1, min(held_out, len(vectors) // 4)) if len(vectors) > 1 else 0
    witnesses = {int(i) for i in np.argsort(distance, kind="stable")[:count]}
    kept = [i for i in range(len(vectors)) if i not in witnesses]
    return TrainingSet.model_validate(dict(
        subject=subject, trigger=trigger, noun=noun, portraits=tuple(portraits.portraits[i] for i in kept),
        captions=tuple(captions.captions[i] for i in kept), held_out=tuple(portraits.portraits[i] for i in sorted(witnesses))))
