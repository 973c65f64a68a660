"""A small S3 server on a folder, for one machine: moto, made to keep its word and what it is given.

    python -m flows.bucket --port 9000 --folder FOLDER --bucket likeness

moto looks at If-None-Match and If-Match and writes afterwards, each request in a thread of its own: two requests may both look before either writes.
Amazon does not allow that, and the Store stands on it. So one request is answered at a time. moto ignores If-Match when an upload in parts is completed,
and takes any checksum for true; both are looked at here. moto holds everything in memory; here every object is a file as well before its writer is
answered, and a server that is started again reads them back. No credentials are checked: loopback only, to try the service with.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

try:
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.exceptions import ClientDisconnected
    from werkzeug.serving import make_server
    from werkzeug.test import run_wsgi_app
    from werkzeug.wrappers import Request, Response
except ImportError as e:                     # an extra: nothing else of Likeness needs it
    raise ImportError("the S3 server to try the service with needs moto: pip install 'likeness[service]'") from e


class Bucket:
    """The application: S3 over WSGI. Requests are answered one at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read back what an earlier server kept.

        Args:
            folder: where objects are kept; None: in memory alone.
        """
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._folder = folder
        self.lock = threading.Lock()
        for path in sorted(folder.glob("*/*")) if folder is not None else ():
            self._load(path)

    def make(self, bucket: str) -> None:
        """Make a bucket unless it is there."""
        if bucket not in _backend().buckets:
            _backend().create_bucket(bucket, "us-east-1")

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            body = request.get_data()
        except ClientDisconnected:
            return Response(status=400)(environ, start_response)
        with self.lock:
            return self.answer(request, body)(environ, start_response)

    def answer(self, request: Request, body: bytes) -> Response:
        """What S3 answers. Within `lock`, or not where disorder is wanted."""
        refused = self._refused(request, body)
        if refused is not None:
            return refused
        inner = request.environ | {"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True}
        chunks, status, headers = run_wsgi_app(self._moto, inner, buffered=True)
        answer = Response(b"".join(chunks), status, headers)
        if self._folder is not None and answer.status_code < 300 and request.method in ("PUT", "POST", "DELETE"):
            self._keep(*_place(request), everything="delete" in request.args)
        return answer

    def _refused(self, request: Request, body: bytes) -> Response | None:
        stated = request.headers.get("x-amz-checksum-sha256")
        if request.method == "PUT" and stated and base64.b64decode(stated) != hashlib.sha256(body).digest():
            return _error(400, "BadDigest")
        expected = request.headers.get("If-Match")
        if request.method == "POST" and expected and "uploadId" in request.args:
            there = _backend().get_object(*_place(request))
            if there is None or there.etag != expected:
                return _error(412, "PreconditionFailed")
        return None

    # -- what is kept: a line of JSON, then the object's bytes

    def _file(self, bucket: str, key: str) -> Path:
        assert self._folder is not None
        return file_of(self._folder, bucket, key)

    def _keep(self, bucket: str, key: str, *, everything: bool) -> None:
        """Have the files say what moto holds: of one key, or which keys there are."""
        if bucket not in _backend().buckets:
            return
        if everything:
            there = {self._file(bucket, name) for name in _backend().buckets[bucket].keys}
            for path in {p for p in self._file(bucket, "").parent.glob("*") if p.suffix != ".part"} - there:
                path.unlink()
        elif key:
            held, path = _backend().get_object(bucket, key), self._file(bucket, key)
            if held is None:
                path.unlink(missing_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            said = {"key": key, "metadata": dict(held.metadata)}
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                file.write(json.dumps(said).encode() + b"\n" + held.value)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)

    def _load(self, path: Path) -> None:
        if path.suffix == ".part":
            path.unlink()                    # its writer was never answered
            return
        said, _, value = path.read_bytes().partition(b"\n")
        head = json.loads(said)
        self.make(path.parent.name)
        _backend().put_object(path.parent.name, head["key"], value).set_metadata(head["metadata"], replace=True)


def file_of(folder: Path, bucket: str, key: str) -> Path:
    """Where an object is kept."""
    return folder / bucket / hashlib.sha256(key.encode()).hexdigest()


def _error(status: int, code: str) -> Response:
    """What S3 answers with `code`."""
    return Response(f"<Error><Code>{code}</Code></Error>", status, content_type="application/xml")


class Quiet(MotoRequestHandler):
    """Logs nothing: keys hold subjects' ids."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing."""


def _backend() -> Any:
    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _place(request: Request) -> tuple[str, str]:
    bucket, _, key = request.path.lstrip("/").partition("/")
    return bucket, key


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    p = argparse.ArgumentParser(prog="python -m flows.bucket", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    p.add_argument("--folder", type=Path, required=True, help="where objects are kept")
    p.add_argument("--bucket", required=True, help="made unless it is there")
    a = p.parse_args()
    application = Bucket(a.folder)
    application.make(a.bucket)
    server = make_server("127.0.0.1", a.port, application, threaded=True, request_handler=Quiet)

    def stop(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()      # it waits for the loop, which this signal has stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.serve_forever(0.2)
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
