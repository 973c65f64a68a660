"""Who is due, in which order, and when a night has failed."""

from __future__ import annotations

import pytest

from likeness.errors import InputError
from likeness.night import (
    Outcome,
    asked_of,
    check_night,
    clear_outcome,
    enrolled,
    last_nights,
    last_outcome,
    note_night,
    note_outcome,
    priority,
    summary,
    why_not_due,
)
from likeness.records import Consent, Enrolment, Reason, Subject
from likeness.store import MemoryStore

ASKED, OTHER = "a" * 64, "b" * 64


def outcome(kind: str, *, night: str = "2026-11-25", **fields: object) -> Outcome:
    return Outcome.model_validate({"night": night, "asked": ASKED, "kind": kind} | fields)


def enrolment(subject: str, source: str = "store:uploads/") -> Enrolment:
    return Enrolment(subject=Subject(id=subject, noun="woman", consent=Consent(source="ticket 1")), source=source)


@pytest.mark.parametrize(("last", "why"), [
    (None, None), (outcome("accepted"), "unchanged"), (outcome("retry"), "unchanged"), (outcome("rejected"), "unchanged"), (outcome("needs_photos"), "unchanged"),
    (outcome("failed", ours=True, failures=1), None), (outcome("failed", ours=True, failures=2), None), (outcome("failed", ours=True, failures=3), "set_aside"),
    (outcome("failed", failures=1), "unchanged"),
])
def test_what_is_new_and_what_failed_is_due(last: Outcome | None, why: str | None) -> None:
    assert why_not_due(last, ASKED, set_aside_after=3) == why
    assert why_not_due(last, OTHER, set_aside_after=3) is None           # other photos, or other settings


def test_anything_that_could_change_the_verdict_makes_a_subject_due() -> None:
    one = enrolment("ada")
    asked = asked_of(one, photos="p", settings={"steps": 1})
    assert asked == asked_of(one, photos="p", settings={"steps": 1})
    consent = one.model_copy(update={"subject": one.subject.model_copy(update={"consent": Consent(source="ticket 2")})})
    assert len({asked, asked_of(one, photos="q", settings={"steps": 1}), asked_of(one, photos="p", settings={"steps": 2}),
                asked_of(consent, photos="p", settings={"steps": 1})}) == 4
    assert asked_of(one.model_copy(update={"source": "store:moved/", "paused": True}), photos="p", settings={"steps": 1}) == asked      # the same bytes elsewhere


def test_new_subjects_go_first_and_failed_ones_last() -> None:
    lasts = {"failed": outcome("failed", night="2026-11-01"), "old": outcome("retry", night="2026-11-02"), "recent": outcome("accepted"), "new": None}
    assert sorted(lasts, key=lambda name: priority(lasts[name])) == ["new", "old", "recent", "failed"]


def test_a_night_fails_only_for_too_many_failures_of_ours() -> None:
    ours, theirs, good = outcome("failed", ours=True), outcome("failed"), outcome("accepted", seconds={"train": 2.0})

    def night(*outcomes: Outcome) -> bool:
        return summary("n", {str(i): o for i, o in enumerate(outcomes)}, others={}, max_failed_share=0.25).ok

    assert night()
    assert night(good, good, good, ours)
    assert not night(good, good, ours)
    assert night(theirs, theirs, theirs)
    numbers = summary("n", {"x": good, "y": good, "z": theirs}, others={"paused": 2}, max_failed_share=0.25)
    assert numbers.counts == {"accepted": 2, "retry": 0, "needs_photos": 0, "rejected": 0, "failed": 1, "paused": 2}
    assert numbers.seconds == {"train": 4.0}


def test_outcomes_lie_inside_the_subject_and_nights_name_nobody() -> None:
    store = MemoryStore()
    for subject in ("bea", "ada"):
        store.put_if_absent(f"subjects/{subject}/enrolment.json", enrolment(subject).model_dump_json().encode())
    store.put_if_absent("subjects/ada/photos/enrolment.json", b"a photo of that name")
    assert enrolled(store) == ["ada", "bea"]
    assert last_outcome(store, "ada") is None
    for kind in ("failed", "accepted", "accepted"):
        note_outcome(store, "ada", outcome(kind))
    assert last_outcome(store, "ada") == outcome("accepted")
    note_outcome(store, "bea", outcome("failed"))
    clear_outcome(store, "bea")
    assert last_outcome(store, "bea") is None
    assert all(key.startswith("subjects/") for key in store.list(""))
    for kind in ("retry", "accepted"):
        note_night(store, summary("2026-11-26", {"ada": outcome(kind)}, others={}, max_failed_share=0.2))
    (kept,) = [store.get(key) or b"" for key in store.list("nights/")]
    assert b"ada" not in kept
    assert b'"accepted":1' in kept


@pytest.mark.parametrize("name", ["", "../x", "Tonight", "a" * 41, "a/b"])
def test_a_nights_id_is_a_name(name: str) -> None:
    with pytest.raises(InputError, match="no id of a night"):
        check_night(name)
    assert check_night("2026-11-26") == "2026-11-26"


def test_a_night_counts_subjects_by_reason_and_names_nobody() -> None:
    twice = (Reason(code="few_faces", message="of ada"), Reason(code="few_faces", message="again"), Reason(code="blurred", message="x"))
    night = summary("n1", {"ada": outcome("needs_photos", reasons=twice), "bea": outcome("retry", reasons=twice[:1]),
                           "cleo": outcome("accepted", reasons=(Reason(code="accepted", message="64%"),))}, others={}, max_failed_share=0.2, took_s=4.0)
    assert (night.reasons, night.took_s) == ({"blurred": 1, "few_faces": 2}, 4.0)
    assert "ada" not in night.model_dump_json()


def test_the_last_nights_are_read_newest_first_and_old_records_too() -> None:
    store = MemoryStore()
    for day in ("24", "26", "25"):
        note_night(store, summary(f"2026-11-{day}", {}, others={}, max_failed_share=0.2))
    store.put_if_absent("nights/2026-11-27.json", b'{"night": "2026-11-27", "counts": {}, "seconds": {}, "ok": true}')      # before there were reasons
    assert [n.night for n in last_nights(store, 3)] == ["2026-11-27", "2026-11-26", "2026-11-25"]
