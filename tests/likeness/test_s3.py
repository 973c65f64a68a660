"""S3Store: what a bucket and a network can get wrong. The contract itself is in test_store.py."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from werkzeug.serving import make_ssl_devcert
from werkzeug.wrappers import Request, Response

from likeness.errors import IntegrityError, LikenessError, RecipeError, ResourceError, ServerUnreachable, TransientError
from likeness.once import ClaimPolicy, once
from likeness.records import Consent
from likeness.s3 import MIB, S3Store, _clock
from likeness.stages import Call
from tests.s3_server import Answer, S3Server, break_tls, break_tls_within, change_the_body, cut, lose_the_answer, refuse, refuse_afterwards

LARGE = os.urandom(5 * MIB + 1)                # one byte more than one part
IN_PARTS = {"multipart_mib": 5}


@pytest.fixture
def store(s3: S3Server) -> S3Store:
    return S3Store(s3.bucket())


@pytest.fixture
def parts(s3: S3Server) -> S3Store:
    return S3Store(s3.bucket(**IN_PARTS))


@pytest.fixture(scope="module")
def running_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, str]]:
    certificate, key = make_ssl_devcert(str(tmp_path_factory.mktemp("tls") / "localhost"), cn="localhost")
    server = S3Server(tls=(certificate, key))
    yield server, certificate
    server.stop()


@pytest.fixture
def tls(running_tls: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server under TLS whose certificate is trusted."""
    server, certificate = running_tls
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
    yield server
    server.calm()


def impatient(s3: S3Server, **options: Any) -> S3Store:
    return S3Store(s3.bucket(**{"patience_s": 0.3} | options))


# -- two processes

RACE = """
import sys
from likeness.s3 import S3Store
from likeness.settings import S3StoreSettings
store, me = S3Store(S3StoreSettings.model_validate_json(sys.argv[1])), sys.argv[2].encode()
print("ready", flush=True); sys.stdin.readline()
created = sum(store.put_if_absent(f"race/{n}", me) for n in range(20))
for n in range(15):
    while True:
        old = store.get("counter")
        if store.compare_and_swap("counter", expected=old, new=b"%d" % (int(old) + 1)):
            break
print(created)
"""


def test_racing_processes_create_once_and_lose_no_swap(s3: S3Server, root: Any) -> None:
    store = S3Store(s3.bucket(patience_s=60.0, timeout_s=60.0))
    store.put_if_absent("counter", b"0")
    racers = [subprocess.Popen([sys.executable, "-c", RACE, store.settings.model_dump_json(), f"racer {n}"], cwd=root, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True) for n in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    created = [int(racer.communicate(timeout=200)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sum(created) == 20
    owners = [store.get(f"race/{n}") for n in range(20)]
    assert [owners.count(b"racer 0"), owners.count(b"racer 1")] == created      # who was told so is whose bytes are there
    assert store.get("counter") == b"30"


# -- weather that passes

def _verbs(store: S3Store) -> list[tuple[str, Any, Any]]:
    return [("PUT", lambda: store.put_if_absent("new", b"n"), True), ("GET", lambda: store.get("old"), b"o"),
            ("PUT", lambda: store.compare_and_swap("old", expected=b"o", new=b"o2"), True), ("GET", lambda: list(store.list("")), ["new", "old"]),
            ("DELETE", lambda: store.delete("old"), None)]


@pytest.mark.parametrize("weather", [refuse(503, "SlowDown"), refuse(500, "InternalError"), refuse(429, ""), refuse(502, ""), refuse(409, "OperationAborted"), cut],
                         ids=["throttled", "internal error", "too many requests", "a proxy's error", "conflict", "cut"])
def test_every_verb_waits_for_better_weather(s3: S3Server, store: S3Store, weather: Answer) -> None:
    store.put_if_absent("old", b"o")
    for method, verb, expected in _verbs(store):
        s3.next(method, weather, weather)
        assert verb() == expected
        assert not s3.weather[method]
    assert list(store.list("")) == ["new"]


@pytest.mark.parametrize("weather", [refuse(400, "BadDigest"), refuse(409, "ConditionalRequestConflict"), refuse(400, "RequestTimeout")], ids=["garbled", "conflict", "slow"])
def test_a_write_that_was_not_taken_is_sent_again(s3: S3Server, store: S3Store, weather: Answer) -> None:
    s3.next("PUT", weather)
    assert store.put_if_absent("k", b"x")
    assert store.get("k") == b"x"


def test_pauses_grow_and_are_bounded(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("likeness.s3._pause", pauses.append)
    s3.next("GET", *[refuse(503, "SlowDown")] * 9)
    assert S3Store(s3.bucket(patience_s=60.0)).get("k") is None
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_bad_weather_that_stays_is_told_in_time(s3: S3Server) -> None:
    s3.next("GET", *[refuse(503, "SlowDown")] * 1000)
    began = time.monotonic()
    with pytest.raises(TransientError, match="fewer requests while reading k") as caught:
        impatient(s3, patience_s=3.0).get("k")
    assert not isinstance(caught.value, ServerUnreachable)
    assert time.monotonic() - began < 30
    assert 1 < len([seen for seen in s3.seen if seen[0] == "GET"]) < 20


def test_a_server_that_is_not_there_is_told(s3: S3Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))                       # nobody listens
        store = S3Store(s3.bucket(patience_s=0.3, endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(ServerUnreachable, match=r"does not answer while reading k \(EndpointConnectionError\)"):
            store.get("k")


# -- answers that are lost

@pytest.mark.parametrize("weather", [lose_the_answer, *(refuse_afterwards(status, code) for status, code in [
    (500, "InternalError"), (503, "SlowDownWrite"), (400, "RequestTimeout"), (409, "OperationAborted")])],
    ids=["lost", "internal error", "too few drives took it", "too late", "conflict"])
def test_a_failure_that_was_none_does_not_turn_an_own_write_into_anothers(s3: S3Server, store: S3Store, weather: Answer) -> None:
    s3.next("PUT", weather)
    assert store.put_if_absent("k", b"mine")
    s3.next("PUT", weather)
    assert store.compare_and_swap("k", expected=b"mine", new=b"mine too")
    assert store.get("k") == b"mine too"


def test_broken_tls_is_weather_before_and_within_an_answer(tls: S3Server) -> None:
    store = S3Store(tls.bucket())
    tls.next("PUT", break_tls)
    assert store.put_if_absent("k", b"mine" * 1000)            # carried out, and refused when repeated
    tls.next("GET", break_tls, break_tls_within)
    assert store.get("k") == b"mine" * 1000
    assert not tls.weather["GET"]


def test_broken_tls_that_stays_is_told(tls: S3Server) -> None:
    store = S3Store(tls.bucket(patience_s=0.3))
    store.put_if_absent("k", b"mine" * 1000)
    for weather in (break_tls, break_tls_within):
        tls.calm()
        tls.next("GET", *[weather] * 100)
        with pytest.raises(ServerUnreachable, match=r"while reading k \(SSLError\)"):
            store.get("k")


def test_a_certificate_that_nobody_vouches_for_is_told_with_the_cure(tls: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tls.bucket()
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(RecipeError, match="AWS_CA_BUNDLE"):
        S3Store(settings).get("k")


def test_a_write_that_times_out_after_it_was_stored_is_our_own(s3: S3Server) -> None:
    given_up = threading.Event()

    def late(request: Request, pass_on: Any) -> Response:
        answer: Response = pass_on()
        given_up.wait(60)
        return answer

    store = S3Store(s3.bucket(timeout_s=2.0, patience_s=60.0))
    s3.next("PUT", late)
    assert store.put_if_absent("k", b"mine")
    assert len([seen for seen in s3.seen if seen[0] == "PUT" and "/k" in seen[1]]) >= 2
    given_up.set()
    assert store.get("k") == b"mine"


@pytest.mark.parametrize("weather", [refuse(500, "InternalError"), refuse(503, "SlowDown"), cut], ids=["internal error", "throttled", "cut"])
def test_anothers_write_does_not_become_ours_even_with_the_same_bytes(s3: S3Server, store: S3Store, weather: Answer) -> None:
    other = S3Store(store.settings)

    def overtaken(request: Request, pass_on: Any) -> Response | None:
        assert other.put_if_absent("k", b"same")
        return weather(request, pass_on)

    s3.next("PUT", overtaken)
    assert not store.put_if_absent("k", b"same")


def test_a_swap_that_another_overtakes_is_false(s3: S3Server, store: S3Store) -> None:
    store.put_if_absent("k", b"old")
    other = S3Store(store.settings)

    def overtaken(request: Request, pass_on: Any) -> Response:
        assert other.compare_and_swap("k", expected=b"old", new=b"others")
        return pass_on()

    s3.next("PUT", overtaken)
    assert not store.compare_and_swap("k", expected=b"old", new=b"mine")
    assert store.get("k") == b"others"

    def deleted(request: Request, pass_on: Any) -> Response:
        other.delete("k")
        return pass_on()

    s3.next("PUT", deleted)
    assert not store.compare_and_swap("k", expected=b"others", new=b"mine")
    assert store.get("k") is None


# -- bytes

def test_every_write_states_its_sha256(s3: S3Server, store: S3Store) -> None:
    store.put_if_absent("k", b"")
    headers = {name.lower(): value for name, value in s3.seen[-1][2].items()}
    assert headers["x-amz-checksum-sha256"] == "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
    assert headers["if-none-match"] == "*"


@pytest.mark.parametrize("change", [lambda body: body[:3], lambda body: body[::-1]], ids=["truncated", "changed"])
def test_damage_on_the_way_is_noticed_and_asked_for_again(s3: S3Server, store: S3Store, change: Any) -> None:
    store.put_if_absent("k", b"pixels")
    s3.next("GET", change_the_body(change))
    assert store.get("k") == b"pixels"


@pytest.mark.parametrize("change", [lambda body: body[:20], lambda body: b"<" * len(body)], ids=["truncated", "a page of something else"])
def test_a_list_that_is_none_is_asked_for_again(s3: S3Server, store: S3Store, change: Any) -> None:
    store.put_if_absent("k", b"")
    s3.next("GET", change_the_body(change))
    assert list(store.list("")) == ["k"]


def test_damage_that_stays_is_no_weather(s3: S3Server) -> None:
    store = impatient(s3)
    store.put_if_absent("k", b"pixels")
    s3.next("GET", *[change_the_body(lambda body: body[::-1])] * 1000)
    with pytest.raises(IntegrityError, match="does not have the checksum"):
        store.get("k")


# -- faults that do not pass

@pytest.mark.parametrize(("status", "code", "kind", "words"), [
    (403, "AccessDenied", RecipeError, r"not allowed in .*docs/store\.md"),
    (403, "", RecipeError, r"not allowed in .*\(AccessDenied\)"),
    (403, "InvalidAccessKeyId", RecipeError, "does not accept the credentials"),
    (403, "SignatureDoesNotMatch", RecipeError, "does not accept the credentials"),
    (400, "ExpiredToken", RecipeError, "renew"),
    (403, "RequestTimeTooSkewed", RecipeError, "clock"),
    (404, "NoSuchBucket", RecipeError, r"does not exist.*store\.bucket"),
    (400, "AuthorizationHeaderMalformed", RecipeError, r"store\.region"),
    (400, "KMS.DisabledException", RecipeError, r"store\.kms_key_id"),
    (501, "NotImplemented", RecipeError, "must honour If-None-Match and If-Match"),
    (400, "<script>", RecipeError, r"HTTP 400, \?script\?"),
    (507, "XMinioStorageFull", ResourceError, "is full"),
    (403, "QuotaExceeded", ResourceError, "is full"),
])
def test_what_a_person_must_cure_is_told_at_once_with_the_cure(s3: S3Server, store: S3Store, status: int, code: str, kind: type[LikenessError], words: str) -> None:
    s3.calm()
    s3.next("PUT", refuse(status, code))
    with pytest.raises(kind, match=words) as caught:
        store.put_if_absent("k", b"x")
    assert type(caught.value) is kind
    assert len(s3.seen) == 1                                # not asked again
    assert not re.search("AKIA|Signature=|http", caught.value.message)
    assert "writing k" in caught.value.message


def test_no_bucket_is_not_taken_for_an_absent_object(s3: S3Server) -> None:
    store = S3Store(s3.bucket().model_copy(update={"bucket": "nobody-made-this"}))
    for verb in (lambda: store.get("k"), lambda: list(store.list("")), lambda: store.put_if_absent("k", b""), lambda: store.delete("k")):
        with pytest.raises(RecipeError, match="'nobody-made-this' does not exist"):
            verb()


def test_without_credentials_boto3s_own_chain_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = s3.bucket()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(RecipeError, match=r"no credentials .*AWS_PROFILE"):
        S3Store(settings).get("k")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(RecipeError, match="ProfileNotFound"):
        S3Store(settings)


# -- parts

def uploads(s3: S3Server, store: S3Store) -> list[Any]:
    return list(s3.client.list_multipart_uploads(Bucket=store.settings.bucket).get("Uploads", []))


def test_large_objects_travel_in_parts_and_keep_the_contract(s3: S3Server, parts: S3Store) -> None:
    s3.calm()
    assert parts.put_if_absent("k", LARGE)
    sent = [headers for method, path, headers in s3.seen if method == "PUT"]
    assert [int(headers["Content-Length"]) for headers in sent] == [5 * MIB, 1]
    assert all("x-amz-checksum-sha256" in {name.lower() for name in headers} for headers in sent)
    assert parts.get("k") == LARGE
    s3.calm()
    assert not parts.put_if_absent("k", LARGE[::-1])
    assert [seen[0] for seen in s3.seen] == ["HEAD"]        # nothing was sent in vain
    assert parts.compare_and_swap("k", expected=LARGE, new=LARGE[::-1])
    assert not parts.compare_and_swap("k", expected=LARGE, new=LARGE)
    assert parts.get("k") == LARGE[::-1]
    assert uploads(s3, parts) == []


def test_an_upload_in_parts_that_is_overtaken_creates_and_swaps_nothing(s3: S3Server, parts: S3Store) -> None:
    other = S3Store(parts.settings)

    def overtaken(write: Any) -> Answer:
        def answer(request: Request, pass_on: Any) -> Response:
            assert write()
            return pass_on()
        return answer

    s3.next("POST", lambda request, pass_on: pass_on(), overtaken(lambda: other.put_if_absent("k", b"others")))      # begin, complete
    assert not parts.put_if_absent("k", LARGE)
    assert parts.get("k") == b"others"
    s3.next("POST", lambda request, pass_on: pass_on(), overtaken(lambda: other.compare_and_swap("k", expected=b"others", new=b"theirs")))
    assert not parts.compare_and_swap("k", expected=b"others", new=LARGE)
    assert parts.get("k") == b"theirs"
    assert uploads(s3, parts) == []


def test_no_parts_are_left_behind_by_an_upload_that_fails(s3: S3Server, parts: S3Store) -> None:
    s3.next("PUT", lambda request, pass_on: pass_on(), refuse(403, "AccessDenied"))
    with pytest.raises(RecipeError, match="not allowed"):
        parts.put_if_absent("k", LARGE)
    assert uploads(s3, parts) == []
    assert parts.get("k") is None


@pytest.mark.parametrize("weather", [
    [refuse(409, "ConditionalRequestConflict")], [refuse(404, "NoSuchUpload")], [lose_the_answer], [refuse(503, "SlowDown")],
    [lose_the_answer, refuse(404, "NoSuchUpload")], [refuse_afterwards(500, "InternalError"), refuse(412, "PreconditionFailed")],
    [refuse_afterwards(409, "ConditionalRequestConflict")],
], ids=["conflict", "dropped", "lost answer", "throttled", "lost answer, upload gone", "lost answer, object there", "conflict that was none"])
def test_an_upload_in_parts_gets_through_bad_weather_at_its_end(s3: S3Server, parts: S3Store, weather: list[Answer]) -> None:
    s3.next("POST", lambda request, pass_on: pass_on(), *weather)
    assert parts.put_if_absent("k", LARGE)
    assert parts.get("k") == LARGE
    assert uploads(s3, parts) == []


def test_uploads_that_are_dropped_again_and_again_end(s3: S3Server, parts: S3Store) -> None:
    s3.next("PUT", *[refuse(404, "NoSuchUpload")] * 5)
    with pytest.raises(TransientError, match="5 uploads in a row"):
        parts.put_if_absent("k", LARGE)


# -- the bucket

def test_pages_prefixes_and_what_is_not_ours(s3: S3Server) -> None:
    settings = s3.bucket(prefix="one/")
    store, other = S3Store(settings, page_keys=2), S3Store(settings.model_copy(update={"prefix": "one/two/"}))
    keys = [f"sub/{n}" for n in range(5)] + ["sub-a", "sub.a"]
    for key in keys:
        store.put_if_absent(key, b"")
    other.put_if_absent("theirs", b"")
    for foreign in ("one/sub/", "one/sub/.hidden", "outside"):
        s3.client.put_object(Bucket=settings.bucket, Key=foreign)
    s3.calm()
    assert list(store.list("sub/")) == [f"sub/{n}" for n in range(5)]
    assert len(s3.seen) == 4                                # 5 keys, a folder's marker and a hidden one, two at a time
    assert list(store.list("")) == sorted([*keys, "two/theirs"])
    assert list(other.list("")) == ["theirs"]
    assert other.get("sub/0") is None


def test_encryption_is_asked_for_whole_and_in_parts(s3: S3Server) -> None:
    store = S3Store(s3.bucket(encryption="aws:kms", kms_key_id="alias/likeness", **IN_PARTS))
    s3.calm()
    store.put_if_absent("small", b"x")
    store.put_if_absent("large", LARGE)
    asked = [{name.lower(): value for name, value in headers.items()} for method, path, headers in s3.seen if "partNumber" not in path and "uploadId" not in path]
    asked = [headers for headers in asked if "x-amz-server-side-encryption" in headers]
    assert [(headers["x-amz-server-side-encryption"], headers["x-amz-server-side-encryption-aws-kms-key-id"]) for headers in asked] == [("aws:kms", "alias/likeness")] * 2


def test_a_bucket_that_keeps_old_versions_says_so(s3: S3Server, store: S3Store) -> None:
    assert not store.versioned()
    s3.client.put_bucket_versioning(Bucket=store.settings.bucket, VersioningConfiguration={"Status": "Enabled"})
    assert store.versioned()


# -- once

def test_once_makes_once_in_a_bucket_though_answers_are_lost(s3: S3Server, store: S3Store) -> None:
    call, claims, makes = Call(stage="crop", subject="ada", params={"side_px": 128}), ClaimPolicy(ttl_s=600.0, wait_s=60.0), []

    def make(claim: Any) -> Consent:
        makes.append(1)
        claim.check()
        return Consent(source="made")

    s3.next("PUT", lose_the_answer, lose_the_answer, lose_the_answer)          # of the claim, a beat, the record: were one taken for another's, the TTL would have to pass
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: once(S3Store(store.settings), call, make, output=Consent, claims=claims), range(2)))
    assert sorted(d.executed for d in done) == [False, True]
    assert makes == [1]
    assert list(store.list("")) == [call.path]


def test_uploads_of_killed_writers_are_found_and_aborted_and_those_of_others_left(s3: S3Server) -> None:
    settings = s3.bucket(prefix="team-a/")
    store = S3Store(settings)

    def begin(key: str) -> str:
        return str(s3.client.create_multipart_upload(Bucket=settings.bucket, Key=key)["UploadId"])

    mine = {begin(f"team-a/subjects/ada/adapters/{n}") for n in range(3)}
    others = {begin("team-b/subjects/ada/adapters/0"), begin("subjects/ada/adapters/0")}
    found = store.unfinished(older_than_s=86_400.0)                           # moto says of every upload that it was begun in 2010
    assert {u.id for u in found} == mine
    assert {u.key for u in found} == {f"subjects/ada/adapters/{n}" for n in range(3)}
    for upload in (*found, found[0]):                                          # twice is fine
        store.abort(upload)
    assert {u["UploadId"] for u in s3.client.list_multipart_uploads(Bucket=settings.bucket)["Uploads"]} == others


def page_of_uploads(*begun: tuple[str, float], following: str | None = None) -> Answer:
    """A page as Amazon gives it (moto knows neither pages nor times): (key, hours since it was begun), and the key from which the next page goes on."""
    more = f"<IsTruncated>true</IsTruncated><NextKeyMarker>{following}</NextKeyMarker><NextUploadIdMarker>u-{following}</NextUploadIdMarker>"
    uploads = "".join(f"<Upload><Key>{key}</Key><UploadId>u-{key}</UploadId><Initiated>{(datetime.now(UTC) - timedelta(hours=hours)).isoformat()}</Initiated></Upload>"
                      for key, hours in begun)
    body = f"<ListMultipartUploadsResult>{more if following else '<IsTruncated>false</IsTruncated>'}{uploads}</ListMultipartUploadsResult>"
    return lambda request, pass_on: Response(body, 200, {"Content-Type": "application/xml"})


def test_uploads_are_read_page_by_page_and_only_old_ones_count(s3: S3Server, store: S3Store) -> None:
    s3.next("GET", page_of_uploads(("a", 24.1), ("b", 23.9), following="b"), page_of_uploads(("c", 500.0)))
    assert [(u.key, u.id) for u in store.unfinished(older_than_s=86_400.0)] == [("a", "u-a"), ("c", "u-c")]
    asked = [path for method, path, _ in s3.seen if method == "GET" and "uploads" in path]
    assert ["key-marker=b" in path and "upload-id-marker=u-b" in path for path in asked[-2:]] == [False, True]


def test_the_servers_own_clock_tells_the_age() -> None:
    stated = {"ResponseMetadata": {"HTTPHeaders": {"date": "Tue, 01 Jan 2030 12:00:00 GMT"}}}
    assert _clock(stated) == datetime(2030, 1, 1, 12, tzinfo=UTC)
    assert abs(_clock({"ResponseMetadata": {"HTTPHeaders": {}}}) - datetime.now(UTC)) < timedelta(minutes=1)
