"""The chain holds link by link, and any tampering shows at the stage where it was done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from likeness import digest
from likeness.errors import InputError, RecipeError
from likeness.lineage import Chain, audit, note_base, note_code, walk
from likeness.records import Release
from likeness.stages import Call, Published
from likeness.store import LocalStore
from tests.likeness.fabricated import BASE, World, build, publish

STAGES = ["register", "judge", "sample", "train", "assemble", "caption", "crop", "ingest"]


def release_of(world: World, *, version: int = 1) -> Release:
    release = Release(subject=world.subject.id, model=f"likeness.{world.subject.id}", version=version, adapter=world.adapter.digest,
                      verdict=world.verdict.digest)
    world.published["register"] = publish(world.store, world.register_call(), release.plain())
    return release


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = build(LocalStore(tmp_path / "store"))
    release_of(made)
    return made


def path_of(world: World, stage: str) -> str:
    return Call(stage=stage, subject="ada", inputs=world.published[stage].inputs, params=world.published[stage].params).path  # type: ignore[arg-type]


def rewrite(world: World, key: str, data: bytes) -> None:
    world.store.delete(key)
    assert world.store.put_if_absent(key, data)


def edit(world: World, stage: str, change: Callable[[dict], None]) -> None:
    record = json.loads(world.store.get(path_of(world, stage)) or b"")
    change(record)
    rewrite(world, path_of(world, stage), json.dumps(record).encode())


def unverified(chain: Chain) -> list[str]:
    return [link.stage for link in chain.links if not link.verified]


def test_an_untouched_chain_is_verified_from_release_to_photos(world: World) -> None:
    chain = walk(world.store, "ada")
    said = chain.as_json()
    assert list(said) == ["subject", "release", "chain", "photos", "ok"]
    assert said["subject"] == "ada"
    assert said["release"] == {"model": "likeness.ada", "version": 1}
    assert [link["stage"] for link in said["chain"]] == STAGES
    assert all(list(link) == ["stage", "key", "digest", "inputs", "verified"] and link["verified"] for link in said["chain"])
    assert said["chain"][0]["inputs"] == [world.published[s].ref.model_dump() for s in ("train", "judge")]
    assert said["photos"] == [p.sha256 for p in world.intake.photos]
    assert said["ok"] is True
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize(("stage", "folder"), [("ingest", "photos"), ("train", "adapters"), ("sample", "samples")])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_blob_shows_at_the_stage_that_made_it(world: World, stage: str, folder: str, damage: str) -> None:
    key = next(iter(world.store.list(f"subjects/ada/{folder}/")))
    data = world.store.get(key) or b""
    world.store.delete(key)
    if damage != "remove":
        world.store.put_if_absent(key, data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:])
    chain = walk(world.store, "ada")
    assert unverified(chain) == [stage]
    assert not chain.ok


def test_a_damaged_crop_shows_at_every_stage_whose_record_holds_it(world: World) -> None:
    key = world.training_set.portraits[0].crop.key
    rewrite(world, key, b"another face")
    assert unverified(walk(world.store, "ada")) == ["assemble", "crop"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_removed_record_shows_and_the_chain_is_not_ok(world: World, stage: str) -> None:
    world.store.delete(path_of(world, stage))
    chain = walk(world.store, "ada")
    assert stage in unverified(chain)
    assert not chain.ok
    link = next(link for link in chain.links if link.stage == stage)
    assert (link.digest, link.inputs) == (world.published[stage].digest, ())


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("how", ["output", "params", "epoch", "digest too", "garbage"])
def test_an_edited_record_shows_at_its_stage(world: World, stage: str, how: str) -> None:
    def change(record: dict) -> None:
        if how in ("output", "digest too"):
            record["output"]["edited"] = True
        if how == "digest too":                    # a careful forger: the record is sound in itself, but not what was handed on
            record["digest"] = digest.of_json(record["output"])
        if how == "params":
            record["params"]["edited"] = True
        if how == "epoch":
            record["epoch"] += 1
    if how == "garbage":
        rewrite(world, path_of(world, stage), b"{not json")
    else:
        edit(world, stage, change)
    chain = walk(world.store, "ada")
    assert stage in unverified(chain)
    if how != "garbage":
        assert unverified(chain)[0] in (stage, "register", "sample", "train")
    assert not chain.ok


def test_a_release_that_names_another_adapter_shows(world: World) -> None:
    def change(record: dict) -> None:
        record["output"]["adapter"] = "0" * 64
        record["digest"] = digest.of_json(record["output"])
    edit(world, "register", change)
    assert unverified(walk(world.store, "ada")) == ["register"]


def test_a_record_under_another_key_shows(world: World) -> None:
    other = build(LocalStore(world.store.root.parent / "other"), photos=4)      # type: ignore[attr-defined]
    rewrite(world, path_of(world, "ingest"), json.dumps(other.published["ingest"].model_dump(mode="json")).encode())
    assert "ingest" in unverified(walk(world.store, "ada"))


def test_a_chosen_release_is_walked_and_the_newest_is_the_default(world: World) -> None:
    call = Call(stage="register", subject="ada", inputs=world.register_call().inputs, params={"again": True})
    second = Release(subject="ada", model="likeness.ada", version=2, adapter=world.adapter.digest, verdict=world.verdict.digest)
    publish(world.store, call, second.plain())
    assert walk(world.store, "ada").release == second
    first = walk(world.store, "ada", 1).release
    assert first is not None
    assert first.version == 1
    assert walk(world.store, "ada", first).release == first
    with pytest.raises(InputError, match="known versions: 1, 2"):
        walk(world.store, "ada", 3)


def test_a_stage_is_walked_from_whatever_else_there_is(world: World) -> None:
    """A second recipe's judgement, before it is registered: its chain is its own, and not that of the Release before it."""
    first = world.published["judge"]
    call = Call(stage="judge", subject="ada", inputs=first.inputs, params=first.params | {"again": True})
    second = publish(world.store, call, first.output)
    chain = walk(world.store, "ada", second.ref)
    assert (chain.release, chain.links[0].key, chain.ok) == (None, second.key, True)
    assert [link.stage for link in chain.links] == STAGES[1:]
    assert {link.key for link in walk(world.store, "ada").links if link.stage == "judge"} == {first.key}
    with pytest.raises(InputError, match=r"judge 0{12}\.\.\. of ada is not published"):
        walk(world.store, "ada", second.ref.model_copy(update={"key": "0" * 64}))


def test_without_a_release_the_furthest_stage_is_walked_from(tmp_path: Path) -> None:
    world = build(LocalStore(tmp_path))
    chain = walk(world.store, "ada")
    assert (chain.as_json()["release"], chain.links[0].stage, chain.ok) == (None, "judge", True)
    with pytest.raises(InputError, match="nothing is published for eve"):
        walk(world.store, "eve")
    with pytest.raises(InputError, match="no subject id"):
        walk(world.store, "../ada")


def test_a_stage_that_is_being_made_is_no_part_of_the_chain(tmp_path: Path) -> None:
    world = build(LocalStore(tmp_path))
    world.store.put_if_absent(world.register_call().path, b'{"state":"claimed"}')
    assert walk(world.store, "ada").links[0].stage == "judge"


@pytest.fixture
def two(tmp_path: Path) -> tuple[World, World, Release, Release]:
    store = LocalStore(tmp_path / "store")
    ada, eve = build(store), build(store, subject="eve")
    return ada, eve, release_of(ada), release_of(eve)


def test_audit_finds_the_releases_of_a_photo(two: tuple[World, World, Release, Release]) -> None:
    ada, _, of_ada, _ = two
    photo = ada.intake.photos[1]
    for name in (photo.sha256, photo.source_sha256, photo.digest):
        assert audit(ada.store, photo=name) == [of_ada]
    assert audit(ada.store, photo="9" * 64) == []


def test_audit_finds_the_releases_on_a_base(two: tuple[World, World, Release, Release]) -> None:
    ada, _, of_ada, of_eve = two
    assert audit(ada.store, base=BASE.files["vae/config.json"]) == []            # nobody said which base has this file
    note_base(ada.store, BASE)
    assert audit(ada.store, base=BASE.digest) == audit(ada.store, base=BASE.files["vae/config.json"]) == [of_ada, of_eve]
    assert audit(ada.store, base="9" * 64) == []


def test_audit_finds_the_releases_of_a_code(two: tuple[World, World, Release, Release]) -> None:
    ada, eve, of_ada, of_eve = two
    commit = "abcdef0123456789" * 2 + "abcdef01"
    for world in (ada, eve):
        call = Call(stage="train", subject=world.subject.id, inputs=world.published["train"].inputs, params=world.published["train"].params)
        note_code(world.store, call, f"0.1.0+g{commit}" if world is ada else "0.1.0+g" + "1" * 40)
        note_code(world.store, call, "0.2.0")
    assert audit(ada.store, code=commit) == audit(ada.store, code=commit[:7]) == audit(ada.store, code=f"0.1.0+g{commit}") == [of_ada]
    assert audit(ada.store, code="1" * 40) == [of_eve]
    assert audit(ada.store, code="0.2.0.dev") == []
    assert walk(ada.store, "ada").ok


def test_audit_still_finds_a_release_whose_middle_is_damaged(two: tuple[World, World, Release, Release]) -> None:
    ada, _, of_ada, of_eve = two
    rewrite(ada, path_of(ada, "train"), b"{not json")
    assert audit(ada.store, base=BASE.digest) == [of_ada, of_eve]                # sample was made on it too
    ada.store.delete(path_of(ada, "train"))
    photo = ada.intake.photos[0].sha256
    assert audit(ada.store, photo=photo) == [of_ada]                             # judge also leads back to the photos, past train


@pytest.mark.parametrize("wanted", [{}, {"photo": "1" * 64, "base": "1" * 64}, {"photo": "ada"}, {"code": "abc"}])
def test_audit_says_what_it_needs(tmp_path: Path, wanted: dict[str, str]) -> None:
    with pytest.raises(RecipeError):
        audit(LocalStore(tmp_path), **wanted)  # type: ignore[arg-type]


def test_published_records_read_back(world: World) -> None:
    assert Published.model_validate_json(world.store.get(path_of(world, "train")) or b"") == world.published["train"]
