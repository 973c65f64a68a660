"""Records: frozen, strict, and the same content has the same digest."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from pydantic import ValidationError

from likeness import records
from likeness.records import BlobRef, Caption, Consent, Reason, Record, Subject, Verdict

SHA = "a" * 64
ADA = Subject(id="ada", noun="woman", consent=Consent(source="operator"))
ALL = [r for _, r in inspect.getmembers(records, inspect.isclass) if issubclass(r, Record) and r is not Record]


@pytest.mark.parametrize("record", ALL, ids=lambda r: r.__name__)
def test_every_record_is_frozen_strict_closed_and_timeless(record: type[Record]) -> None:
    for option in ("frozen", "strict"):
        assert record.model_config[option], option                       # type: ignore[literal-required]
    assert record.model_config["extra"] == "forbid"
    timed = [name for name in record.model_fields if re.search(r"(^|_)(at|time|host|hostname|path|run_id|date)$", name)]
    assert timed == []


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ADA.id = "bob"      # type: ignore[misc]


def test_what_was_written_is_read_back_with_the_same_digest() -> None:
    verdict = Verdict(kind="retry", reasons=(Reason(code="few", message="too few", value=0.1, needed=0.4),), scores={"identity": None, "copies": 0.5},
                      measured=SHA, policy=SHA)
    again = Verdict.read(verdict.model_dump_json())
    assert again == verdict
    assert again.digest == verdict.digest
    assert verdict.plain()["delivered"] == []                            # defaults are written out: adding one changes old digests knowingly


def test_a_known_digest_stays_what_it_is() -> None:
    assert ADA.plain() == {"id": "ada", "noun": "woman", "consent": {"source": "operator"}}
    assert ADA.digest == "19a30711074f56f0fc56257bb1c69d8cfa6fc8f9d3e9d5de626902dbcf469b3f"


@pytest.mark.parametrize(("record", "fields", "words"), [
    (BlobRef, {"key": "k", "sha256": SHA, "size": 1, "media": "m", "path": "/x"}, "path\n.*Extra"),
    (BlobRef, {"key": "k", "sha256": SHA, "size": "1", "media": "m"}, "valid integer"),
    (BlobRef, {"key": "k", "sha256": SHA, "size": -1, "media": "m"}, "greater than"),
    (BlobRef, {"key": "k", "sha256": SHA.upper(), "size": 1, "media": "m"}, "sha256"),
    (BlobRef, {"key": "k", "sha256": SHA + "\n", "size": 1, "media": "m"}, "sha256"),
    (Reason, {"code": "c", "message": "m", "value": float("nan")}, "finite"),
    (Caption, {"portrait": SHA, "text": "", "source": "slots"}, "at least 1"),
    (Consent, {"source": ""}, "at least 1"),
], ids=["unknown field", "text for a number", "negative size", "upper case", "newline", "nan", "empty caption", "empty consent"])
def test_what_is_no_such_record_is_refused(record: type[Record], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        record(**fields)


@pytest.mark.parametrize("name", ["", "Ada", "../ada", "a/b", "-ada", "a b", "ada\n", "ä", "x" * 64, ".ada"])
def test_a_subject_id_is_safe_in_any_key(name: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        Subject(id=name, noun="woman", consent=Consent(source="x"))
