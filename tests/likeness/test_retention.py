"""What attempts leave is deleted after its days; what a Release was made of never is, nor anything while somebody is at work."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pytest

from likeness.errors import IntegrityError
from likeness.lineage import note_code, walk
from likeness.once import Claimed
from likeness.processes import this_process
from likeness.records import Release
from likeness.retention import Pruned, prune
from likeness.stages import Call
from likeness.store import MemoryStore, put_blob
from tests.likeness.fabricated import World, build, publish

DAY = date(2026, 11, 27)


@pytest.fixture
def world() -> World:
    """Of ada, accepted and registered, with a second attempt that was refused, and a training that nobody finished."""
    made = build(MemoryStore())
    store = made.store
    publish(store, made.register_call(), Release(model="likeness.ada", version=1, subject="ada", adapter=made.adapter.digest, verdict=made.verdict.digest).plain())
    weights = put_blob(store, "subjects/ada/adapters", b"other weights", media="application/vnd.safetensors")
    train = Call(stage="train", subject="ada", inputs=(made.published["assemble"].ref,), params={"recipe": "another"})
    note_code(store, train, "0.1.0")
    refused = publish(store, train, made.adapter.model_copy(update={"weights": weights}).plain())
    image = put_blob(store, "subjects/ada/samples", b"another sample", media="image/png")
    sample = publish(store, Call(stage="sample", subject="ada", inputs=(refused.ref,)), {"samples": [{"image": image.plain()}, {"image": made.samples.samples[0].image.plain()}]})
    publish(store, Call(stage="judge", subject="ada", inputs=(made.published["assemble"].ref, sample.ref)), {"verdict": {"kind": "retry"}})
    store.put_if_absent(f"subjects/ada/stages/train/{'c' * 64}/checkpoint-000004.safetensors", b"half way")
    return made


def keys(world: World) -> set[str]:
    return set(world.store.list("")) - {"subjects/ada/retention.json"}


def test_a_refused_attempt_goes_after_its_days_and_the_release_stays_whole(world: World) -> None:
    before = keys(world)
    assert prune(world.store, "ada", today=DAY, days=30) == Pruned(subject="ada", waiting=6)
    assert keys(world) == before
    assert prune(world.store, "ada", today=DAY + timedelta(29), days=30).waiting == 6
    assert prune(world.store, "ada", today=DAY + timedelta(30), days=30) == Pruned(subject="ada", records=3, blobs=2, checkpoints=1)
    gone = before - keys(world)
    assert sorted("/".join(key.split("/")[2:4 if "stages" in key or "code" in key else 3]) for key in gone) == [
        "adapters", "code/train", "samples", "stages/judge", "stages/sample", "stages/train", "stages/train"]
    assert walk(world.store, "ada").ok
    assert "subjects/ada/retention.json" not in set(world.store.list(""))
    assert prune(world.store, "ada", today=DAY + timedelta(60), days=30) == Pruned(subject="ada")


def test_a_dry_run_counts_and_leaves_no_trace(world: World) -> None:
    before = set(world.store.list(""))
    assert prune(world.store, "ada", today=DAY, days=0, dry_run=True) == Pruned(subject="ada", records=3, blobs=2, checkpoints=1)
    assert set(world.store.list("")) == before


def test_bytes_that_an_attempt_of_today_names_wait_for_it(world: World) -> None:
    prune(world.store, "ada", today=DAY, days=30)
    [weights] = [key for key in world.store.list("subjects/ada/adapters/") if world.store.get(key) == b"other weights"]
    again = Call(stage="train", subject="ada", inputs=(world.published["assemble"].ref,), params={"recipe": "a third"})
    publish(world.store, again, world.adapter.model_copy(update={"weights": put_blob(world.store, "subjects/ada/adapters", b"other weights",
                                                                                    media="application/vnd.safetensors")}).plain())
    found = prune(world.store, "ada", today=DAY + timedelta(30), days=30)
    assert (found.records, found.blobs, found.waiting) == (3, 1, 2)
    assert weights in keys(world)
    assert again.path in keys(world)
    assert prune(world.store, "ada", today=DAY + timedelta(60), days=30) == Pruned(subject="ada", records=1, blobs=1)


def test_nothing_is_touched_while_somebody_makes_a_stage(world: World) -> None:
    before = keys(world)
    world.store.put_if_absent(f"subjects/ada/stages/train/{'d' * 64}.json", Claimed(token="t", beat=0, ttl_s=60.0, owner=this_process()).model_dump_json().encode())
    assert prune(world.store, "ada", today=DAY, days=0) == Pruned(subject="ada", busy=True)
    assert before < keys(world)


def test_a_process_that_dies_half_way_leaves_nothing_that_the_next_does_not_delete(world: World) -> None:
    class Dies(MemoryStore):
        left = 3

        def delete(self, key: str, /) -> None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            super().delete(key)

    dying: Any = Dies()
    for key in world.store.list(""):
        dying.put_if_absent(key, world.store.get(key))
    with pytest.raises(KeyboardInterrupt):
        prune(dying, "ada", today=DAY, days=0)
    dying.left = 1_000
    assert walk(dying, "ada").ok
    prune(dying, "ada", today=DAY, days=0)
    prune(world.store, "ada", today=DAY, days=0)
    assert set(dying.list("")) - {key for key in dying.list("") if "/code/" in key} == keys(world) - {key for key in keys(world) if "/code/" in key}


def test_without_a_release_everything_that_is_no_attempt_stays(world: World) -> None:
    store = world.store
    for key in list(store.list("subjects/ada/stages/register/")):
        store.delete(key)
    prune(store, "ada", today=DAY, days=0)
    assert {key.split("/")[3] for key in store.list("subjects/ada/stages/")} == {"ingest", "crop", "caption", "assemble"}
    assert {key.split("/")[2] for key in keys(world)} == {"photos", "portraits", "stages"}


def test_a_record_that_cannot_be_read_ends_it_before_anything_is_deleted(world: World) -> None:
    [register] = world.store.list("subjects/ada/stages/register/")
    world.store.delete(register)
    world.store.put_if_absent(register, b"{damaged")
    before = keys(world)
    with pytest.raises(IntegrityError):
        prune(world.store, "ada", today=DAY, days=0)
    assert keys(world) == before
