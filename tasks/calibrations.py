"""How often the thresholds in force err: what is known of it, and measuring it. Kept in the Store, where every worker that writes a report finds it; nothing of anybody is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

from pydantic import ValidationError

from likeness import digest
from likeness.calibration import Calibrations, Conditions, choose, shipped
from likeness.errors import TransientError
from likeness.stages import STAGES
from models.quality import findings, prospects
from tasks.runtime import Tools

PREFIX = "calibrations/"


def conditions_of(tools: Tools) -> Conditions:
    """What rates depend on, as these settings have it."""
    settings, faces = tools.settings, tools.faces
    return Conditions(thresholds=settings.gate.thresholds, recogniser=faces.recogniser_name, second=None if faces.second is None else faces.second.recogniser_name, bank=tools.bank.digest,
                      base=tools.base_ref.name, revision=tools.base_ref.revision, drawn=prospects.drawn_by(settings), slots=tools.slots_digest, usual=findings.table_digest(),
                      unsafe=tools.unsafe.name, epoch=STAGES["judge"])


def known_of(tools: Tools) -> tuple[Calibrations | None, str]:
    """(calibrations, words) of the settings in force: None, and the words say why, where nobody measured them."""
    conditions, kept = conditions_of(tools), []
    data = tools.store.get(_path(conditions))
    if data is not None:
        try:
            kept.append(Calibrations.read(data))
        except ValidationError:
            pass                                   # of a version that kept other things: as if it were not there
    return choose([*kept, *shipped()], tools.settings.gate, conditions)


def calibrate(tools: Tools, users: Path, nouns: Mapping[str, str], *, today: date, command: str, tell: Callable[[str, int, int, str], None]) -> Calibrations:
    """Measure every threshold on the people below `users`; `tell` hears of part, done, total, words.

    Raises:
        InputError: too few people with photos enough.
    """
    from models.quality import albums, calibrating

    settings, faces = tools.settings, tools.faces
    people, left_out = albums.read_albums(users, nouns, faces=faces, policy=settings.intake, side_px=tools.base_ref.resolution_px, tell=lambda *now: tell("photos", *now))
    looked = albums.look(people, faces=faces, reader=tools.slots, safety=tools.unsafe, base=tools.base_ref.revision, held_out=settings.intake.held_out, tell=lambda *now: tell("pictures", *now))
    asks = settings.gate.min_editability_share > 0 or settings.gate.min_diversity_share > 0
    study = calibrating.Study(looked, settings.gate, settings.battery, faces.recogniser_name, tools.bank, tools.second_bank, lambda noun: tools.base_scores(noun, measure=asks),
                              findings.usual([], base=tools.base_ref.revision).limits, settings.sampling.bare)
    tell("rates", 0, 1, "")
    rows = calibrating.calibrate(study)
    tell("rates", 1, 1, "")
    return Calibrations(conditions=conditions_of(tools), date=today.isoformat(), command=command, people=len(people), pictures=sum(len(p.crops) for p in people),
                        source=digest.of_json([digest.of_bytes(p.crops.tobytes()) for p in people]), left_out=left_out, rows=rows)


def keep(tools: Tools, found: Calibrations) -> None:
    """Keep them in the Store in the place of older ones of the same conditions.

    Raises:
        TransientError: others keep writing at the same time.
    """
    path, new = _path(found.conditions), found.model_dump_json().encode()
    for _ in range(10):
        old = tools.store.get(path)
        if tools.store.put_if_absent(path, new) if old is None else tools.store.compare_and_swap(path, expected=old, new=new):
            return
    raise TransientError("the calibrations are being written by others at the same time: run the same command again")


def _path(conditions: Conditions) -> str:
    return f"{PREFIX}{conditions.digest}.json"
