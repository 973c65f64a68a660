"""What tasks need of their process: settings, store, networks, registry, each built once, on first use."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from likeness import digest
from likeness.erasure import Fenced, check_not_forgotten
from likeness.errors import ConsentMissing, InputError, IntegrityError, UnknownBase
from likeness.lineage import note_base, note_code
from likeness.once import Absent, Claim, find, once
from likeness.records import BaseRef, BaseScores, ClassPictures, Enrolment, Record
from likeness.settings import LocalStoreSettings, Settings, load_settings
from likeness.stages import Call, Published, StageName, StageRef
from likeness.store import LocalStore, Store
from likeness.version import code_version
from tasks import pictures

if TYPE_CHECKING:
    from likeness.registry import Registry
    from models.captions.captioner import Captioner
    from models.captions.slots import SlotReader
    from models.diffusion.bases import Base
    from models.faces.tools import FaceTools
    from models.maquette.companions import Bank
    from models.quality.unsafe import UnsafeReader

R = TypeVar("R", bound=Record)


class Watcher(Protocol):
    """Told what happens, so that a person can watch: stage, done, total, words."""

    def __call__(self, stage: str, done: int, total: int, words: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a task returns: where its record is published, whether this run made it, how long that took."""

    ref: StageRef
    executed: bool
    seconds: float


class NotMade(Exception):
    """While stages are only looked for: this one is not published."""

    def __init__(self, stage: StageName, found: Absent) -> None:
        super().__init__(f"{stage} is not published")
        self.stage, self.found = stage, found


_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


@contextmanager
def only_looking() -> Iterator[None]:
    """In this context stages are looked for and never made: what is not published raises NotMade."""
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


@dataclass
class Tools:
    """Everything a task may reach."""

    settings: Settings
    watch: Watcher = field(default=lambda stage, done, total, words: None)

    @cached_property
    def store(self) -> Store:
        return Fenced(self.bare_store)

    @cached_property
    def bare_store(self) -> Store:
        """The store without the fence: for those who erase, and for the doctor."""
        settings = self.settings.store
        if isinstance(settings, LocalStoreSettings):
            return LocalStore(settings.root or self.settings.home / "store")
        from likeness.s3 import S3Store  # boto3 takes its time to load

        for name, value in self.settings.up.credentials.items():
            os.environ.setdefault(name, value)
        return S3Store(settings)

    @cached_property
    def base_folder(self) -> Path | None:
        """Where the base lies, downloaded first if the settings say so; None for one that ships."""
        from models.diffusion import hub

        return hub.place(self.settings.base, folder=self.settings.base_folder, cache=self.settings.home / "bases", download=self.settings.base_hub)

    @cached_property
    def base_ref(self) -> BaseRef:
        from models.diffusion import bases

        reference = bases.reference(self.settings.base, folder=self.base_folder)
        note_base(self.store, reference)                       # so that `audit` finds a base by one of its files
        return reference

    @cached_property
    def base(self) -> Base:
        from models.diffusion import bases

        base = bases.load(self.settings.base, folder=self.base_folder)
        if base.ref != self.base_ref:
            raise IntegrityError(f"the files of base {base.ref.name!r} changed while this process ran: start it again")
        return base

    @cached_property
    def base_trigger(self) -> str:
        """The word that stands for the subject."""
        from models.diffusion import bases

        return bases.CATALOGUE[self.base_ref.name].trigger

    @cached_property
    def base_framings(self) -> tuple[Literal["tight", "wide"], ...]:
        """Which crops of a photo the base is trained on."""
        from models.diffusion import bases

        return bases.CATALOGUE[self.base_ref.name].framings

    @cached_property
    def faces(self) -> FaceTools:
        from models.faces.tools import face_tools

        return face_tools(self.settings.backends)

    @cached_property
    def slots(self) -> SlotReader:
        from models.captions.slots import SlotReader
        from models.diffusion.bases import MAQUETTE

        return SlotReader.load(MAQUETTE / "weights" / "clip")

    @cached_property
    def slots_digest(self) -> str:
        """Digest of the network that reads slots."""
        from models.diffusion import bases

        files = bases.reference("maquette").files
        return digest.of_json({name: sha for name, sha in files.items() if name.startswith("clip/")})

    @cached_property
    def captions_folder(self) -> Path:
        """Where the network of `backends.captions` lies, if it is not the maquette's; downloaded first if the settings say so."""
        from models.captions import image_to_text

        backends = self.settings.backends
        return image_to_text.place(folder=backends.captions_folder, hub=backends.captions_hub, cache=self.settings.home / "captioners")

    @cached_property
    def captioner_params(self) -> dict[str, Any]:
        """What of the captioner decides its captions: its name, its files, its own numbers."""
        name = self.settings.backends.captions
        if name == "slots":
            from models.captions.slots import MIN_PROBABILITY

            return {"captioner": name, "min_probability": MIN_PROBABILITY, "clip": self.slots_digest}
        from models.captions.image_to_text import files_of

        return {"captioner": name, "files": files_of(name, self.captions_folder)}

    @cached_property
    def captioner(self) -> Captioner:
        name = self.settings.backends.captions
        if name == "slots":
            return self.slots
        from models.captions.image_to_text import ImageToText

        loaded = ImageToText.load(name, self.captions_folder)
        if loaded.files != self.captioner_params["files"]:
            raise IntegrityError(f"the files of captioner {name!r} changed while this process ran: start it again")
        return loaded

    @cached_property
    def unsafe(self) -> UnsafeReader:
        """Whoever says which samples are unsafe."""
        from models.quality.unsafe import OpenNsfw

        return OpenNsfw()

    @cached_property
    def bank(self) -> Bank:
        from models.maquette.companions import bank_for

        return bank_for(self.faces, cache=self.settings.home / "banks")

    @cached_property
    def second_bank(self) -> Bank | None:
        """The bank as the second recogniser sees it; None where one alone votes."""
        from models.maquette.companions import bank_for

        return None if self.faces.second is None else bank_for(self.faces.second, cache=self.settings.home / "banks")

    def base_scores(self, noun: str, *, measure: bool = False) -> BaseScores | None:
        """What the base alone draws on this battery: shipped, or kept in the store, or with `measure` drawn and measured now; the first to keep them is right.

        None if nobody measured it yet.
        """
        from models.maquette.companions import read_base_scores
        from models.quality.base import measure_base, scores_key

        battery, sampling = self.settings.battery, self.settings.sampling
        if self.faces.detector.name == "dlib" and (shipped := read_base_scores(noun, revision=self.base_ref.revision, battery=battery.digest, sampling=sampling)):
            return shipped
        path = f"base-scores/{scores_key(self.base_ref, self.faces, self.slots_digest, battery, sampling, noun)}.json"
        if measure and self.store.get(path) is None:
            found = measure_base(self.base, self.faces, self.slots, battery, sampling, noun,
                                 progress=lambda done, total: self.watch("judge", done, total, f"what the base alone makes of a {noun}"))
            self.store.put_if_absent(path, found.model_dump_json().encode())
        data = self.store.get(path)
        return None if data is None else BaseScores.read(data)

    def class_pictures(self, noun: str, *, beat: Callable[[str], None] = lambda doing: None) -> tuple[NDArray[np.uint8], list[str]]:
        """Class pictures for prior preservation (M, S, S, 3) at the base's resolution, with their captions: those that ship, or else drawn by the base once and kept in the store for all
        subjects; the first to keep them is right.

        Raises:
            IntegrityError: a kept picture is not what was written.
        """
        from models.diffusion.class_pictures import captions_of, draw_class, pictures_key

        images, captions = self.shipped_class_pictures(noun)
        if captions:
            return images, captions
        path = f"class-pictures/{pictures_key(self.base_ref, noun)}.json"
        if self.store.get(path) is None:
            def progress(done: int, total: int) -> None:
                self.watch("train", done, total, f"pictures of a {noun}, once for this base")
                beat(f"drawing picture {done} of {total} of a {noun}")

            drawn = draw_class(self.base, noun, progress=progress)
            kept = ClassPictures(pictures=tuple(pictures.put(self.store, "class-pictures", image) for image in drawn))
            self.store.put_if_absent(path, kept.model_dump_json().encode())
        data = self.store.get(path)
        if data is None:
            raise IntegrityError(f"the class pictures of {noun!r} were written and are not there: is something else deleting from this store?")
        kept = ClassPictures.read(data)
        return pictures.stack(self.store, kept.pictures), captions_of(noun)

    def shipped_class_pictures(self, noun: str) -> tuple[NDArray[np.uint8], list[str]]:
        """Class pictures that ship for this base and noun, with their captions: what a decoder is tuned on beside the portraits. M is 0 where none do."""
        from models.maquette.companions import read_class_pictures

        side_px = self.base_ref.resolution_px
        if self.base_ref.name == "maquette":
            with suppress(UnknownBase):
                return read_class_pictures(noun, side_px=side_px)
        return np.zeros((0, side_px, side_px, 3), np.uint8), []

    @cached_property
    def registry(self) -> Registry:
        from likeness.registry import Registry

        registry = self.settings.registry
        home = self.settings.home
        address = registry.tracking_uri.get_secret_value() if registry.tracking_uri else f"sqlite:///{home / 'mlflow.db'}"
        # a server decides where artifacts lie; a folder of this machine would be no place for the other workers
        own = None if address.startswith(("http://", "https://")) else home / "mlflow-artifacts"
        return Registry(address, registry.artifact_root or own)

    def once(self, call: Call, make: Callable[[Claim], R], output: type[R]) -> Outcome:
        """The published output of `call`, made now if it is not there; refuses subjects without standing.

        Raises:
            NotMade: within `only_looking`, if it is not there.
        """
        self.standing(call.subject)
        began = time.monotonic()
        if _LOOKING.get():
            there = find(self.store, call, output=output)
            if isinstance(there, Absent):
                raise NotMade(call.stage, there)
            return Outcome(there.ref, False, time.monotonic() - began)

        def noted(claim: Claim) -> R:
            note_code(self.store, call, code_version())        # which code made it: beside the record, whose key it must not change
            return make(claim)

        done = once(self.store, call, noted, output=output, claims=self.settings.claims,
                    on_wait=lambda words: self.watch(call.stage, 0, 0, f"another worker is at it: {words or 'no progress yet'}"))
        self.watch(call.stage, 1, 1, "made" if done.executed else "found published")
        return Outcome(done.ref, done.executed, time.monotonic() - began)

    def progress(self, stage: str, total: int) -> Callable[[int, str], None]:
        """A function that reports (done, words) of a stage."""
        return lambda done, words: self.watch(stage, done, total, words)

    def standing(self, subject: str) -> Enrolment:
        """The subject's enrolment, if they are enrolled and not forgotten: asked before every stage.

        Raises:
            SubjectForgotten, ConsentMissing.
            IntegrityError: their enrolment cannot be read.
        """
        check_not_forgotten(self.store, subject)
        data = self.store.get(f"subjects/{subject}/enrolment.json")
        if data is None:
            raise ConsentMissing(f"subject {subject!r} is not enrolled: run `likeness run PHOTOS --subject {subject} --class NOUN`")
        try:
            return Enrolment.read(data)
        except ValidationError as e:
            raise IntegrityError(f"the enrolment of subject {subject!r} cannot be read: enrol them again with `likeness subject add`") from e

    def enrol(self, enrolment: Enrolment, *, keep_paused: bool = False) -> None:
        """Write or replace an enrolment; with `keep_paused` a paused subject stays paused.

        Raises:
            SubjectForgotten: if the subject has a tombstone.
        """
        check_not_forgotten(self.store, enrolment.subject.id)
        path = f"subjects/{enrolment.subject.id}/enrolment.json"
        for _ in range(10):
            found = self.store.get(path)
            paused = _paused(found) if found and keep_paused else enrolment.paused
            new = enrolment.model_copy(update={"paused": paused}).model_dump_json().encode()
            if found == new or (self.store.put_if_absent(path, new) if found is None else self.store.compare_and_swap(path, expected=found, new=new)):
                return
        raise InputError(f"subject {enrolment.subject.id!r} is being enrolled by others at the same time: try again")

    def open(self, ref: StageRef, subject: str, kind: type[R]) -> R:
        """The record that a stage published.

        Raises:
            IntegrityError: it is gone, or not what its digest says.
        """
        return kind.read(json.dumps(self.published(ref, subject).output))

    def published(self, ref: StageRef, subject: str) -> Published:
        """What `open` reads, with the references that it was made from.

        Raises:
            IntegrityError: it is gone, or not what its digest says.
        """
        data = self.store.get(f"subjects/{subject}/stages/{ref.stage}/{ref.key}.json")
        if data is None:
            raise IntegrityError(f"the record of {ref.stage} is gone from the store: run the same command again to make it anew")
        published = Published.model_validate_json(data)
        if published.digest != ref.digest or published.faults():
            raise IntegrityError(f"the record of {ref.stage} is not what was published: {'; '.join(published.faults()) or 'its digest differs'}")
        return published


def _paused(data: bytes) -> bool:
    """Of an enrolment that may be damaged: then it is replaced, and nobody knows."""
    try:
        return Enrolment.read(data).paused
    except ValidationError:
        return False


_LOCK = threading.Lock()
_TOOLS: list[Tools] = []


def configure(tools: Tools) -> None:
    """Give this process its tools: the command line does, a worker does not and gets them from its own environment."""
    with _LOCK:
        _TOOLS[:] = [tools]


def runtime() -> Tools:
    """This process's tools."""
    with _LOCK:
        if not _TOOLS:
            config = os.environ.get("LIKENESS_CONFIG")
            _TOOLS.append(Tools(load_settings(Path(config) if config else None)))
        return _TOOLS[0]
