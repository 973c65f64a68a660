"""S3Store: the Store in a bucket, on conditional writes. Any server that honours If-None-Match and If-Match on writes will do.

botocore's own retries are off. It would send a write again after a lost answer and hand us the refusal, 412, of the repetition: nobody
could tell then that the object is our own. Here every write carries a random mark as metadata. If a repetition is refused, whatever the first
attempt met, the mark of the object that is there says whose it is. What that cannot tell: our object was
there and was changed or deleted by another before we looked. Then the verb returns False, which is true of the moment of looking; claims hold a
token of their own, so that `once` notices. And a write that timed out may still be on its way: it can create again what was deleted since.
`delete_prefix` looks until nothing appears, and a tombstone outlives a person's prefix.

A key of the Store is `prefix + key` in the bucket. Credentials come from boto3's own chain and from nowhere else.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import boto3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from likeness.errors import IntegrityError, LikenessError, RecipeError, ResourceError, ServerUnreachable, TransientError
from likeness.settings import S3StoreSettings
from likeness.store import check_key, check_prefix, is_key

log = logging.getLogger(__name__)
T = TypeVar("T")

MIB = 1 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
_FAULTS = (boto.BotoCoreError, boto.ClientError, ResponseParserError, HTTPError)     # HTTPError: broken TLS within a body passes through botocore as it is
_MARK = "write"                      # x-amz-meta-write: which call wrote this object
_CONFLICTS = 5                       # uploads in parts that meet another writer must begin anew: so often


@dataclass(frozen=True)
class Upload:
    """An upload in parts that was begun and not ended; its parts are bytes that no listing of objects shows."""

    key: str
    id: str
    since: datetime                      # of the server


class S3Store:
    """A bucket, or what lies below a prefix of one. Safe to use from several threads; `get` of a changed key is never stale."""

    def __init__(self, settings: S3StoreSettings, *, page_keys: int = 1000) -> None:
        """Use the bucket that `settings` name; nothing is asked of the server yet.

        Args:
            settings: which bucket, and how it is spoken to.
            page_keys: keys asked for at once when listing, 1 to 1000.

        Raises:
            RecipeError: if boto3 cannot be set up this way: no region, a profile that does not exist.
        """
        self.settings = settings
        self._page_keys = page_keys
        self._part_bytes = settings.multipart_mib * MIB
        self._encryption = {name: value for name, value in (("ServerSideEncryption", settings.encryption), ("SSEKMSKeyId", settings.kms_key_id)) if value}
        try:
            self._client = boto3.session.Session().client("s3", region_name=settings.region, endpoint_url=settings.endpoint_url, config=Config(
                retries={"total_max_attempts": 1, "mode": "standard"}, connect_timeout=settings.timeout_s, read_timeout=settings.timeout_s,
                s3={"addressing_style": settings.addressing}, max_pool_connections=16,
                # We give every write its SHA-256 in a header; checksums in a trailer are more than some servers understand.
                request_checksum_calculation="when_required", response_checksum_validation="when_supported"))
        except (boto.BotoCoreError, ValueError) as e:
            raise RecipeError(f"the S3 client cannot be set up ({type(e).__name__}): check [store] and the profile and region of boto3") from e

    def get(self, key: str, /) -> bytes | None:
        """See Store. A body that is cut short or does not have the checksum that the server states is asked for again.

        Raises:
            IntegrityError: if it never has that checksum.
            RecipeError: no such bucket, no credentials, not allowed.
            TransientError: if the server does not answer in time.
        """
        found = self._read(check_key(key), f"reading {key}", self._until())
        return None if found is None else found[0]

    def put_if_absent(self, key: str, data: bytes, /) -> bool:
        """See Store.

        Raises:
            RecipeError, TransientError, ResourceError: as `get`, and if the server is full. After a TransientError the object may be there.
        """
        if len(data) >= self._part_bytes and self._head(check_key(key), f"looking for {key}", self._until()) is not None:
            return False                     # so that gigabytes are not sent to learn that they are there
        return self._write(check_key(key), data, {"IfNoneMatch": "*"}, f"writing {key}", self._until())

    def compare_and_swap(self, key: str, /, *, expected: bytes, new: bytes) -> bool:
        """See Store; raises what put_if_absent raises. After a TransientError the change may have been made."""
        doing, until = f"changing {key}", self._until()
        found = self._read(check_key(key), doing, until)
        if found is None or found[0] != expected:
            return False
        return self._write(key, new, {"IfMatch": found[1]}, doing, until)

    def list(self, prefix: str, /) -> Iterator[str]:
        """See Store; raises what `get` raises. Objects whose names are no keys are not ours, and are left out."""
        start = self.settings.prefix + check_prefix(prefix)
        doing = f"listing {prefix or 'the store'}"
        keys: list[str] = []
        more: dict[str, str] = {}
        while True:
            page = self._ask(doing, self._until(), lambda: self._client.list_objects_v2(
                Bucket=self.settings.bucket, Prefix=start, MaxKeys=self._page_keys, **more))       # noqa: B023  (called at once)
            keys += [found["Key"].removeprefix(self.settings.prefix) for found in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return iter(sorted(key for key in keys if is_key(key)))
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str, /) -> None:
        """See Store; raises what `get` raises. In a bucket with versioning the bytes stay as an old version: see `versioned`."""
        self._ask(f"deleting {check_key(key)}", self._until(), lambda: self._client.delete_object(**self._at(key)), answers=("NoSuchKey",), otherwise=None)

    def versioned(self) -> bool:
        """Whether the bucket keeps what is deleted or changed as old versions: then nothing in it is ever erased by us.

        Raises:
            RecipeError: if asking is not allowed (s3:GetBucketVersioning).
        """
        found = self._ask("asking whether the bucket keeps old versions", self._until(),
                          lambda: self._client.get_bucket_versioning(Bucket=self.settings.bucket))
        return "Status" in found             # Enabled, or Suspended: then older versions may still be there

    def unfinished(self, *, older_than_s: float) -> Sequence[Upload]:
        """Uploads in parts that were begun so long ago by the server's own clock and neither completed nor aborted: their writers were killed, most likely.

        Raises:
            RecipeError: if asking is not allowed (s3:ListBucketMultipartUploads); otherwise as `get`.
        """
        found = []
        more: dict[str, str] = {}
        while True:
            page = self._ask("listing unfinished uploads", self._until(), lambda: self._client.list_multipart_uploads(
                Bucket=self.settings.bucket, Prefix=self.settings.prefix, MaxUploads=self._page_keys, **more))         # noqa: B023  (called at once)
            now = _clock(page)
            for upload in page.get("Uploads", ()):
                key = upload["Key"].removeprefix(self.settings.prefix)
                if upload["Key"].startswith(self.settings.prefix) and is_key(key) and (now - upload["Initiated"]).total_seconds() >= older_than_s:
                    found.append(Upload(key, upload["UploadId"], upload["Initiated"]))
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort(self, upload: Upload) -> None:
        """Delete the parts of an unfinished upload; one that is gone is fine. Should its writer live, it is told so by the server and begins anew."""
        self._ask(f"aborting an upload of {upload.key}", self._until(), lambda: self._client.abort_multipart_upload(**self._at(upload.key), UploadId=upload.id),
                  answers=("NoSuchUpload",), otherwise=None)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.settings.bucket, "Key": self.settings.prefix + key}

    def _until(self) -> float:
        return time.monotonic() + self.settings.patience_s

    def _read(self, key: str, doing: str, until: float) -> tuple[bytes, str] | None:
        """The bytes and the ETag of an object; None if it is absent."""
        def request() -> tuple[bytes, str]:
            found = self._client.get_object(**self._at(key), ChecksumMode="ENABLED")
            with closing(found["Body"]) as body:
                return body.read(), found["ETag"]
        found: tuple[bytes, str] | None = self._ask(doing, until, request, answers=("NoSuchKey",), otherwise=None)
        return found

    def _head(self, key: str, doing: str, until: float) -> Mapping[str, str] | None:
        """The metadata of an object; None if it is absent."""
        found: Mapping[str, str] | None = self._ask(doing, until, lambda: self._client.head_object(**self._at(key))["Metadata"],
                                                    answers=("NoSuchKey",), otherwise=None)
        return found

    def _write(self, key: str, data: bytes, condition: Mapping[str, str], doing: str, until: float) -> bool:
        """Whether the object is now `data`, written by this very call: False if the condition did not hold."""
        mark = secrets.token_hex(16)
        send = self._send_in_parts if len(data) >= self._part_bytes else self._send_whole
        repeated = False
        for _ in range(_CONFLICTS):
            try:
                send(key, data, condition, mark, doing, until)
            except _Answer as answer:
                repeated |= answer.repeated
                if repeated:
                    there = self._head(key, doing, self._until())
                    if there is not None and there.get(_MARK) == mark:
                        return True          # an earlier attempt was carried out, its answer was lost
                if answer.code in ("PreconditionFailed", "NoSuchKey"):
                    return False
                _pause(FIRST_PAUSE_S)        # a conflict, or an upload that the server dropped: begin anew
                repeated = True
            else:
                return True
        raise TransientError(f"{_CONFLICTS} uploads in a row were dropped by the store while {doing}: others write the same key; try again in a moment")

    def _send_whole(self, key: str, data: bytes, condition: Mapping[str, str], mark: str, doing: str, until: float) -> None:
        self._ask(doing, until, lambda: self._client.put_object(
            **self._at(key), Body=data, **_checksum(data), **condition, **self._encryption, Metadata={_MARK: mark}), answers=("PreconditionFailed", "NoSuchKey"))

    def _send_in_parts(self, key: str, data: bytes, condition: Mapping[str, str], mark: str, doing: str, until: float) -> None:
        """One part after the other, each with its own patience. Whatever goes wrong, no parts are left behind, unless this process is killed or the
        server does not answer: the first is for the bucket's lifecycle rule, the second is logged as well.
        """
        upload = {"UploadId": self._ask(doing, until, lambda: self._client.create_multipart_upload(
            **self._at(key), ChecksumAlgorithm="SHA256", **self._encryption, Metadata={_MARK: mark}))["UploadId"]}
        try:
            parts = []
            for n, start in enumerate(range(0, len(data), self._part_bytes), 1):
                part = data[start:start + self._part_bytes]
                checksum = _checksum(part)
                sent = self._ask(doing, self._until(), lambda: self._client.upload_part(
                    **self._at(key), **upload, PartNumber=n, Body=part, **checksum), answers=("NoSuchUpload",))      # noqa: B023  (called at once)
                parts.append({"PartNumber": n, "ETag": sent["ETag"], "ChecksumSHA256": checksum["ChecksumSHA256"]})
            self._ask(doing, self._until(), lambda: self._client.complete_multipart_upload(**self._at(key), **upload, **condition, MultipartUpload={"Parts": parts}),
                      answers=("PreconditionFailed", "NoSuchKey", "NoSuchUpload", "ConditionalRequestConflict"))
        except BaseException:
            try:
                self._client.abort_multipart_upload(**self._at(key), **upload)
            except _FAULTS as e:
                if _code(e) != "NoSuchUpload":
                    log.warning("parts of %s may be left in the bucket (%s): a lifecycle rule that aborts old uploads removes them", key, _code(e))
            raise

    def _ask(self, doing: str, until: float, request: Callable[[], T], *, answers: tuple[str, ...] = (), otherwise: Any = ...) -> Any:
        """What `request` returns; asked again, with growing random pauses, while that may help and `until` has not come.

        Args:
            doing: for messages.
            until: on the monotonic clock; no attempt begins after it, except the first.
            request: one request.
            answers: codes that are answers, not faults: `otherwise` is returned, or _Answer raised where nothing is given.
            otherwise: see answers.
        """
        pause_s, repeated = FIRST_PAUSE_S, False
        while True:
            try:
                return request()
            except _FAULTS as e:
                code = _code(e)
                if code in answers:
                    if otherwise is ...:
                        raise _Answer(code, repeated) from e
                    return otherwise
                fault = _fault(e, code, doing, self.settings)
                if not fault.again or time.monotonic() + pause_s > until:
                    raise fault.error from e
                log.info("%s met %s and is tried again", doing, code)
            _pause(pause_s)
            repeated = True                  # no fault says for sure that nothing was done: SlowDown may follow a write that too few drives took
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


@dataclass
class _Answer(Exception):
    """The server's answer was `code`; an earlier attempt may have been carried out if `repeated`."""

    code: str
    repeated: bool


@dataclass(frozen=True)
class _Fault:
    """What to raise, and whether asking again may help."""

    error: LikenessError
    again: bool = False


def _pause(longest_s: float) -> None:
    time.sleep(random.uniform(0, longest_s))          # jitter over the whole length: many workers that were refused at once come back spread out


def _clock(answer: Mapping[str, Any]) -> datetime:
    """The server's, as its answer states it; this machine's if it does not."""
    try:
        stated = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError):
        return datetime.now(UTC)
    return stated if stated.tzinfo else stated.replace(tzinfo=UTC)


def _checksum(data: bytes) -> dict[str, str]:
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": base64.b64encode(hashlib.sha256(data).digest()).decode()}


_NO_BODY = {301: "PermanentRedirect", 403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed"}      # the answer to HEAD has no code
_THROTTLED = re.compile(r"SlowDown|Throttl|RequestLimitExceeded|TooManyRequests|BandwidthLimitExceeded")
_GARBLED = {"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout"}                      # on the way to the server
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted"}
_FULL = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage"}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidClientTokenId"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "UnauthorizedAccess", "Forbidden"}
_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "Redirect"}


def _code(error: Exception) -> str:
    """The server's code, or the class of a client-side error. Nothing else of an error is ever shown: texts hold addresses and worse."""
    if not isinstance(error, boto.ClientError):
        return type(error).__name__
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code.isdigit() or not code:
        status = _status(error)
        return _NO_BODY.get(status, str(status))
    return "NoSuchKey" if code == "NotFound" else re.sub(r"[^\w.]", "?", code)[:60]


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _fault(error: Exception, code: str, doing: str, settings: S3StoreSettings) -> _Fault:
    bucket = f"bucket {settings.bucket!r}"
    if isinstance(error, boto.ClientError):
        return _fault_of_server(code, _status(error), doing, bucket)
    weather = ServerUnreachable(f"the store ({bucket}) does not answer while {doing} ({code}), asked for {settings.patience_s:g} s: check the network and "
                                "store.endpoint_url; the same command may work in a moment")
    match error:
        case boto.SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return _Fault(RecipeError(f"the certificate of the store ({bucket}) is not one that is trusted here: point AWS_CA_BUNDLE at its authority"))
        case boto.EndpointConnectionError() | boto.ConnectTimeoutError() | boto.ProxyConnectionError() | boto.SSLError() | boto.ReadTimeoutError() \
                | boto.ConnectionClosedError() | boto.ResponseStreamingError() | boto.IncompleteReadError() | ResponseParserError() | HTTPError():
            return _Fault(weather, again=True)
        case boto.FlexibleChecksumError() | boto.ChecksumError():
            return _Fault(IntegrityError(f"what the store gave does not have the checksum that it states, while {doing}: restore that object from a backup, "
                                         "or delete it and run the same command again"), again=True)
        case boto.NoCredentialsError() | boto.PartialCredentialsError() | boto.CredentialRetrievalError() | boto.TokenRetrievalError() | boto.SSOError() \
                | boto.LoginError() | boto.NoAuthTokenError() | boto.ProfileNotFound():
            return _Fault(RecipeError(f"no credentials for the store ({bucket}) while {doing} ({code}): give them to boto3's own chain, "
                                      "for example AWS_PROFILE, AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, or the role of this machine"))
        case boto.MetadataRetrievalError():
            return _Fault(weather, again=True)                       # the machine's role was not told in time: nothing was sent
    return _Fault(RecipeError(f"the store ({bucket}) cannot be asked while {doing} ({code}): check bucket, region and endpoint_url in [store]"))


def _fault_of_server(code: str, status: int, doing: str, bucket: str) -> _Fault:
    if status == 429 or _THROTTLED.search(code):
        return _Fault(TransientError(f"the store ({bucket}) asks for fewer requests while {doing} ({code}): try again later, with fewer workers"), again=True)
    if code in _CONFLICT:
        return _Fault(TransientError(f"others change the same key of {bucket} while {doing} ({code}): the same command may work in a moment"), again=True)
    if code in _GARBLED:
        return _Fault(TransientError(f"the store ({bucket}) did not get all bytes while {doing} ({code}): check the network; the same command may work in a moment"),
                      again=True)
    if code in _FULL or status == 507:
        return _Fault(ResourceError(f"the store ({bucket}) is full while {doing} ({code}): free some space and run the same command again"))
    if code == "NotImplemented" or status == 501:
        return _Fault(RecipeError(f"the server of {bucket} cannot do what is needed while {doing} ({code}): it must honour If-None-Match and If-Match on writes, "
                                  "docs/store.md; `likeness doctor` checks it"))
    if status >= 500:
        return _Fault(ServerUnreachable(f"the store ({bucket}) is in trouble while {doing} ({code}): the same command may work in a moment"), again=True)
    if code == "NoSuchBucket":
        return _Fault(RecipeError(f"{bucket} does not exist, found while {doing}: create it, or correct store.bucket, store.region or store.endpoint_url"))
    if code in _CREDENTIALS:
        return _Fault(RecipeError(f"the store ({bucket}) does not accept the credentials while {doing} ({code}): renew those that boto3's own chain finds"))
    if code in _DENIED or status == 401:
        return _Fault(RecipeError(f"not allowed in {bucket} while {doing} ({code}): give this role the permissions of docs/store.md"))
    if code == "RequestTimeTooSkewed":
        return _Fault(RecipeError(f"the clock of this machine is wrong, says the store ({bucket}) while {doing}: set it"))
    if code in _REGION:
        return _Fault(RecipeError(f"{bucket} is in another region, found while {doing} ({code}): set store.region to it"))
    if code.startswith("KMS."):
        return _Fault(RecipeError(f"the key that encrypts {bucket} cannot be used while {doing} ({code}): check store.kms_key_id, and that this role may use the key"))
    return _Fault(RecipeError(f"the store ({bucket}) refuses {doing} (HTTP {status}, {code}): check [store]; `likeness doctor` shows more"))
