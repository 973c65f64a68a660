"""The records: what travels between stages. Frozen, strict, small; they carry references to bytes, never pixels.

A record is content: no times, hosts, paths or run ids in it, so that the same work done twice has the same digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import to_jsonable_python

from likeness import digest
from likeness.digest import Digest

SubjectId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
ClassNoun = Literal["man", "woman", "person", "dog"]
Box = tuple[float, float, float, float]          # left, top, right, bottom


def every_field(model: BaseModel) -> dict[str, Any]:
    """Plain JSON data of a model, those fields too that its dump leaves out; secrets are masked."""
    return {name: _plain(getattr(model, name)) for name in type(model).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return every_field(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else to_jsonable_python(value)


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """Plain JSON data as it is stored and as its digest is taken: without fields that are younger than the record and say nothing where they are at their default."""
        return self.model_dump(mode="json")

    def whole(self) -> dict[str, Any]:
        """Plain JSON data of every field: what people are shown, and what may be written into settings, whose defaults are others."""
        return every_field(self)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return digest.of_json(self.plain())

    @classmethod
    def read(cls, data: bytes | str) -> Self:
        """The record of this JSON.

        Raises:
            pydantic.ValidationError: if it is not one, naming each field.
        """
        return cls.model_validate_json(data)


class BlobRef(Record):
    """Where bytes lie in the Store, and what they are."""

    key: str
    sha256: Digest
    size: int = Field(ge=0)
    media: str


class ClassPictures(Record):
    """Pictures of a class noun that a base drew by itself; nobody is in them. Their captions follow from the noun: words here might be the id of somebody who is forgotten, for whom all records are searched."""

    pictures: tuple[BlobRef, ...]


class Consent(Record):
    """Who allowed this, as a reference into the operator's own records; "operator" when nobody else was named."""

    source: str = Field(min_length=1, max_length=200)


class Subject(Record):
    """Whoever is personalised."""

    id: SubjectId
    noun: ClassNoun
    consent: Consent


class Enrolment(Record):
    """A subject and where their photos are read from. Lies inside the subject's prefix, so that erasing the prefix erases the path.

    `paused`: nights leave them out.
    """

    subject: Subject
    source: str
    paused: bool = False


class FaceMeasures(Record):
    """What was measured on the face of a Portrait, in the upright photo."""

    box_px: Box
    eye_distance_px: float = Field(gt=0)
    roll_deg: float
    sharpness: float = Field(ge=0)
    score: float
    visible: float = Field(ge=0, le=1)


class Photo(Record):
    """One source picture: decoded safely, upright, sRGB, stripped of metadata, stored as PNG."""

    sha256: Digest                # of the pixels as stored
    source_sha256: Digest         # of the file as it was given
    blob: BlobRef
    width_px: int = Field(gt=0)
    height_px: int = Field(gt=0)
    sidecar: str | None = Field(None, max_length=2000)      # the words of a caption file beside it


class PhotoJudgement(Record):
    """What intake said of one file. `name` is relative to the folder, POSIX, undecodable bytes as \\xNN."""

    name: str
    verdict: Literal["accept", "normalise", "reject", "ignore"]
    reason: str | None
    message: str


class SetJudgement(Record):
    """What intake said of the set as a whole."""

    verdict: Literal["ok", "reject"]
    reason: str | None
    message: str
    advice: tuple[str, ...] = ()


class Intake(Record):
    """The output of `ingest`: judged files and the photos that are used."""

    photos: tuple[Photo, ...]
    judgements: tuple[PhotoJudgement, ...]
    set: SetJudgement


class Portrait(Record):
    """An aligned training crop cut from one Photo."""

    photo: Digest
    crop: BlobRef                 # PNG, side_px x side_px, RGB
    mask: BlobRef                 # PNG, same size, grey: 255 is face
    side_px: int = Field(gt=0)
    framing: Literal["tight", "wide"]
    face: FaceMeasures
    embedding: tuple[float, ...]  # of the gate's own recogniser, as the network gives it


class Caption(Record):
    """What must stay editable in a Portrait, never who it is."""

    portrait: Digest
    text: str = Field(min_length=1, max_length=2000)
    slots: dict[str, str] = {}
    source: Literal["slots", "sidecar", "image_to_text"]


class PortraitSet(Record):
    """All Portraits of one Intake, best first."""

    portraits: tuple[Portrait, ...]


class CaptionSet(Record):
    """The Captions of a PortraitSet, in its order."""

    captions: tuple[Caption, ...]


class TrainingSet(Record):
    """Portraits and their captions; the last `held_out` are witnesses, never trained on."""

    subject: Digest
    trigger: str
    noun: ClassNoun
    portraits: tuple[Portrait, ...]
    captions: tuple[Caption, ...]
    held_out: tuple[Portrait, ...]


class BaseRef(Record):
    """A pretrained pipeline, pinned: name, family, and the sha256 of each file."""

    name: str
    family: Literal["sd15", "sdxl"]
    resolution_px: int = Field(gt=0)
    prediction: Literal["epsilon", "v_prediction"]
    licence: str
    revision: str
    files: dict[str, Digest]


class DevicePlan(Record):
    """How a step of training was laid out on the device, from one step on, because it did not fit as it was."""

    from_step: int = Field(ge=0)
    pieces: int = Field(ge=1)                     # of a batch, one after the other; their gradients add up to the batch's
    gradient_checkpointing: bool = False          # activations are computed twice instead of being kept


class CurvePoint(Record):
    """One checkpoint of a training, scored on a few pictures. None could not be measured."""

    step: int = Field(ge=1)
    identity: float | None = Field(ge=0, le=1)       # mean position of unstylised pictures between strangers (0) and the subject's own photos (1)
    obedience: float | None = Field(ge=0, le=1)      # share of the details, asked for against the photos, that are seen
    samples: int = Field(ge=0)                       # pictures that were drawn for it


class Curve(Record):
    """The checkpoints of a training that were scored, and which of them became the Adapter."""

    points: tuple[CurvePoint, ...] = Field(min_length=1)
    chosen: int                                      # its step
    stopped: bool = False                            # the training was ended early: both scores had fallen twice
    witnesses: tuple[Digest, ...] = ()               # the held-out Portraits that had a part in it

    @model_validator(mode="after")
    def _chosen_is_one_of_the_points(self) -> Self:
        steps = [point.step for point in self.points]
        if steps != sorted(set(steps)) or self.chosen not in steps:
            raise ValueError(f"points in the order of their steps, and one of them chosen; {steps} with {self.chosen} chosen is not that")
        return self


class Adapter(Record):
    """Trained weights of one Subject: safetensors whose header names what it was trained from."""

    training_set: Digest
    recipe: Digest
    base: Digest
    weights: BlobRef
    losses: tuple[tuple[int, float], ...]         # (step, mean loss since the last report)
    steps: int = Field(ge=0)                      # that the weights have learnt for
    device_plans: tuple[DevicePlan, ...] = Field((), exclude_if=lambda plans: plans == ())      # each that memory forced; without any, the digest is as ever
    curve: Curve | None = Field(None, exclude_if=lambda curve: curve is None)      # where a checkpoint was chosen


class BatteryPrompt(Record):
    """One fixed prompt. `{who}` stands for trigger and class noun."""

    category: str
    template: str
    slots: dict[str, str] = {}

    def text(self, who: str) -> str:
        """The prompt for one person, e.g. "zqaa woman"."""
        return self.template.format(who=who)


class Sample(Record):
    """One generated picture."""

    adapter: Digest
    prompt: str
    category: str
    slots: dict[str, str] = {}            # what must be seen in it for the prompt to count as followed
    seed: int = Field(ge=0)
    image: BlobRef


class SampleSet(Record):
    """All samples of one Adapter on one battery."""

    adapter: Digest
    battery: Digest
    samples: tuple[Sample, ...]
    bare: tuple[Sample, ...] = Field((), exclude_if=lambda samples: samples == ())      # drawn with the adapter for the class noun alone: is it still anybody?


FindingCode = Literal["no_face", "extra_face", "cropped_face", "tiny_face", "grid", "blur", "colour_cast", "over_saturated", "plastic_skin", "eyes", "mouth", "melted", "unsafe",
                      "unmeasured"]


class Finding(Record):
    """One typed defect in one sample: what was measured, where a defect begins, where it is seen."""

    code: FindingCode
    score: float | None = None            # in the unit of its sign: `models.quality.findings`; None if unmeasured
    threshold: float | None = None
    box_px: Box | None = None             # in the sample; None where there is no place
    of: FindingCode | None = None         # unmeasured: which sign failed; None for the detector itself


class SampleScore(Record):
    """What was measured on one sample. None means that it could not be measured, which never passes."""

    image: Digest
    category: str
    faces: int | None
    identity_distance: float | None       # to the nearest of the held-out portraits' centroid, in the recogniser's metric
    position: float | None                # 0: the impostor floor, 1: the subject's own ceiling
    nearest_training: float | None        # appearance distance to the nearest training crop
    findings: tuple[Finding, ...] = ()
    slots_right: int = Field(0, ge=0)
    slots_asked: int = Field(0, ge=0)
    second_distance: float | None = Field(None, exclude_if=lambda value: value is None)      # as the second recogniser sees it, where there is one
    second_position: float | None = Field(None, exclude_if=lambda value: value is None)


class BaseScores(Record):
    """What a base alone draws on a battery, the bare class noun in place of the subject: what an Adapter's scores are held against."""

    revision: str                         # of the base
    battery: Digest
    steps: int = Field(ge=1)              # of a sample
    guidance: float
    noun: str
    samples: int = Field(ge=1)
    one_face_share: float = Field(ge=0, le=1)
    editability: float | None = Field(ge=0, le=1)      # share of the slots that prompts ask for which the base's CLIP sees; None if none is asked
    by_category: dict[str, float]         # editability of each category of prompts
    slots: dict[str, tuple[int, int]]     # the same in counts: (seen, asked for)
    diversity: float | None               # mean appearance distance of two unstylised samples
    spread: float | None                  # `likeness.gate.spread` of as many seeds as the battery has; None if there are too few samples with one face


class Recogniser(Record):
    """A second recogniser, with its own references of the subject."""

    backend: str
    bank: str
    threshold: float
    ceiling: float
    floor: float


class Measurements(Record):
    """All numbers the gate reads."""

    backend: str
    bank: str
    threshold: float                      # identity distance below which a sample is this person, from calibration
    ceiling: float                        # median leave-one-out distance of the subject's own portraits
    floor: float                          # median distance of the impostor bank
    usable_portraits: int = Field(ge=0)
    diversity: float | None = None        # mean appearance distance between two unstylised samples; None below two
    scores: tuple[SampleScore, ...]
    apart: tuple[tuple[float, ...], ...] = ()      # row i: appearance distance of sample i to each sample before it; empty if not measured
    bare: tuple[SampleScore, ...] = ()    # samples of the class noun alone
    base: BaseScores | None = None        # what the base alone does on this battery; None if that is not known
    second: Recogniser | None = Field(None, exclude_if=lambda value: value is None)
    more: tuple[SampleScore, ...] = Field((), exclude_if=lambda scores: scores == ())      # of samples drawn besides, after the scores in `apart`: only for delivery

    @model_validator(mode="after")
    def _apart_is_of_the_scores(self) -> Self:
        known = len(self.scores) + len(self.more)
        if self.apart and [len(row) for row in self.apart] != list(range(known)):
            raise ValueError(f"`apart` must have a row for each of {known} scores, row i with i distances")
        return self


class Reason(Record):
    """One reason of a Verdict."""

    code: str
    message: str
    value: float | None = None
    needed: float | None = None


class Verdict(Record):
    """What the gate decided, and why."""

    kind: Literal["accepted", "retry", "needs_photos", "rejected"]
    reasons: tuple[Reason, ...]
    scores: dict[str, float | None]
    measured: Digest
    policy: Digest
    delivered: tuple[Digest, ...] = ()    # digests of the samples handed to the owner: the most alike first, then each the least like those before it


class Release(Record):
    """A registered model version. One per (subject, training set, recipe)."""

    subject: SubjectId
    model: str
    version: int = Field(ge=1)
    adapter: Digest
    verdict: Digest
