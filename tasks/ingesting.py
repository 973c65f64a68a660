"""ingest: a folder of files becomes Photos, judged one by one and as a set."""

from __future__ import annotations

import hashlib

from prefect import task

from likeness import digest
from likeness.errors import UnusablePhotos
from likeness.intake.sources import Source, open_source
from likeness.once import Claim
from likeness.records import Intake, Photo
from likeness.stages import Call
from models.faces.photos import inspect_photos
from tasks import pictures
from tasks.policy import RETRIED
from tasks.runtime import Outcome, Tools, runtime


@task(name="ingest", task_run_name="ingest {subject}", **RETRIED)
def ingest_photos(subject: str) -> Outcome:
    """Read the subject's source, judge every file, keep what can be used."""
    tools = runtime()
    source = open_source(tools.standing(subject).source, store=tools.store, policy=tools.settings.intake)
    files = source_digest(source)
    call = Call(stage="ingest", subject=subject, params={"files": files, "policy": tools.settings.intake.plain(), "backend": tools.faces.recogniser_name,
                                                         "slots": tools.slots_digest, "clarity": tools.faces.clarity.digest})
    return tools.once(call, lambda claim: _ingest(tools, call, source, claim), Intake)


def source_digest(source: Source) -> str:
    """Digest of the names and bytes of a source: names are part of what intake reports, so a renamed file is judged anew."""
    entries = []
    for entry in source.entries():
        data = entry.read()
        entries.append([entry.name, hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data.reason])
    if not entries:
        raise UnusablePhotos("the source of photos is empty: put photos of one person into it")
    return digest.of_json(entries)


def _ingest(tools: Tools, call: Call, source: Source, claim: Claim) -> Intake:
    tell = tools.progress(call.stage, 0)

    def progress(done: int, total: int) -> None:
        tools.watch(call.stage, done, total, "")
        claim.beat(f"judged {done} of {total} files")

    tell(0, "decoding")
    found = inspect_photos(source, tools=tools.faces, policy=tools.settings.intake, reader=tools.slots, progress=progress)
    photos = []
    for photo in found.accepted if found.set.verdict == "ok" else ():
        blob = pictures.put(tools.store, f"subjects/{call.subject}/photos", photo.pixels)
        photos.append(Photo(sha256=blob.sha256, source_sha256=photo.source_sha256, blob=blob, width_px=photo.pixels.shape[1],
                            height_px=photo.pixels.shape[0], sidecar=photo.sidecar))
    return Intake(photos=tuple(photos), judgements=tuple(found.judgements), set=found.set)
