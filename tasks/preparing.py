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
from models.faces.portraits import choose_witnesses, cut_portraits
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime


@task(name="crop", task_run_name="crop {subject}", **RETRIED)
def crop_portraits(subject: str, intake: StageRef) -> Outcome:
    """Cut aligned Portraits with their face masks out of every accepted Photo: a tight one, and a wide one where the base wants it."""
    tools = runtime()
    side_px = tools.base_ref.resolution_px
    call = Call(stage="crop", subject=subject, inputs=(intake,), params={"side_px": side_px, "backend": tools.faces.name, "framings": list(tools.base_framings)})
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
        alignment, vector = align.fit(face.points), tools.faces.embed_faces(pixels, [face])[0]
        cuts = cut_portraits(pixels, face, tools.faces, side_px=side_px, framings=tools.base_framings)
        sharpness = tools.faces.sharpness(cuts[0].crop)
        portraits += [Portrait(
            photo=photo.sha256, crop=pictures.put(tools.store, folder, cut.crop), mask=pictures.put(tools.store, folder, cut.mask), side_px=side_px,
            framing=cut.framing, embedding=tuple(float(v) for v in vector),
            face=FaceMeasures(box_px=face.box_px, eye_distance_px=alignment.eye_distance_px, roll_deg=alignment.roll_deg, sharpness=sharpness,
                              score=face.score, visible=cut.visible)) for cut in cuts]
        claim.beat(f"cut {number + 1} of {len(intake.photos)} photos")
    if not portraits:
        raise UnusablePhotos("no face could be cut out of any accepted photo: add photos in which the face is large and sharp")
    return PortraitSet(portraits=tuple(sorted(portraits, key=lambda p: (-p.face.visible, p.photo, p.framing))))


@task(name="caption", task_run_name="caption {subject}", **RETRIED)
def caption_portraits(subject: str, intake: StageRef, portraits: StageRef, noun: str) -> Outcome:
    """Say in words what must stay editable in every Portrait; sidecar files win."""
    tools = runtime()
    trigger = tools.base_trigger
    call = Call(stage="caption", subject=subject, inputs=(intake, portraits), params={"who": f"{trigger} {noun}", **tools.captioner_params})
    return tools.once(call, lambda claim: _caption(tools, tools.open(intake, subject, Intake), tools.open(portraits, subject, PortraitSet), f"{trigger} {noun}"), CaptionSet)


def _caption(tools: Tools, intake: Intake, portraits: PortraitSet, who: str) -> CaptionSet:
    words = {photo.sha256: photo.sidecar for photo in intake.photos}
    # a reader that knows tight crops only: what it sees there holds for the wide crop of the same photo
    tight = {p.photo: p.crop for p in portraits.portraits if p.framing == "tight"}
    crops = pictures.stack(tools.store, [p.crop if tools.captioner.wide else tight[p.photo] for p in portraits.portraits])
    texts = slots.subject_captions(tools.captioner, crops, [words.get(p.photo) for p in portraits.portraits], who=who)
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

    Witnesses are whole photos (`models.faces.portraits.choose_witnesses`); no other crop of a held-out photo is trained on.
    """
    every = portraits.portraits
    tight = [i for i, p in enumerate(every) if p.framing == "tight"]
    witnesses = {tight[i] for i in choose_witnesses(np.asarray([every[i].embedding for i in tight], np.float64), held_out)}
    seen = {every[i].photo for i in witnesses}
    kept = [i for i in range(len(every)) if every[i].photo not in seen]
    return TrainingSet.model_validate(dict(
        subject=subject, trigger=trigger, noun=noun, portraits=tuple(portraits.portraits[i] for i in kept),
        captions=tuple(captions.captions[i] for i in kept), held_out=tuple(portraits.portraits[i] for i in sorted(witnesses))))
