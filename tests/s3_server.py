"""An S3 server for tests: that of `likeness up` (flows/bucket.py) in this process, and bad weather on order."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any
from xml.sax.saxutils import escape

import boto3
from botocore.config import Config
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from flows.bucket import Bucket, Quiet
from likeness.settings import S3StoreSettings

Answer = Callable[[Request, Callable[[], Response]], Response | None]
_NO_TLS = b"\x17\x03\x03\x00\x20" + bytes(32)           # framed as a record of application data, encrypted with nothing


class S3Server:
    """On a free port of this machine, until `stop`. `weather[METHOD]` holds what the next requests of that method meet instead of moto."""

    def __init__(self, *, tls: tuple[str, str] | None = None) -> None:
        """Listen; under TLS with `tls`, the files of a certificate for "localhost" and of its key."""
        self.weather: dict[str, deque[Answer]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []           # method, path with query, headers
        self.deaf_to: set[str] = set()                                  # headers that this server does not understand
        self.orderly = True                                             # one request at a time; False: as moto is
        self._bucket = Bucket()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet, ssl_context=tls)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"{'https://localhost' if tls else 'http://127.0.0.1'}:{self._server.server_port}"
        self.client = boto3.session.Session().client("s3", endpoint_url=self.url, verify=tls[0] if tls else None, config=Config(retries={"total_max_attempts": 1}))

    def bucket(self, **options: Any) -> S3StoreSettings:
        """A new bucket, and settings for it."""
        name = f"test-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return S3StoreSettings.model_validate({"bucket": name, "endpoint_url": self.url, "timeout_s": 30.0, "patience_s": 30.0} | options)

    def next(self, method: str, *answers: Answer) -> None:
        """Order the weather for the next requests of `method`."""
        self.weather.setdefault(method, deque()).extend(answers)

    def calm(self) -> None:
        """Cancel what was ordered, and forget what was seen."""
        self.weather.clear()
        self.seen.clear()
        self.deaf_to.clear()
        self.orderly = True

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        for name in self.deaf_to:
            environ.pop(f"HTTP_{name.upper().replace('-', '_')}", None)
        request = Request(environ)
        body = request.get_data()
        self.seen.append((request.method, request.full_path.rstrip("?"), dict(request.headers)))
        waiting = self.weather.get(request.method)

        def pass_on() -> Response:
            with self._bucket.lock if self.orderly else nullcontext():
                return self._bucket.answer(request, body)
        answer = waiting.popleft()(request, pass_on) if waiting else pass_on()
        if answer is None:                                               # the line is cut
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("as ordered")
        chunks = answer(environ, start_response)
        return _then_cut(chunks, environ["werkzeug.socket"]) if isinstance(answer, _AsItIs) else chunks


def error(status: int, code: str) -> Response:
    """What S3 answers with `code`, with secrets that no message of ours may repeat; without a code, what a proxy answers."""
    text = f"<Error><Code>{escape(code)}</Code><Message>key AKIASECRET at https://host/?X-Amz-Signature=5ec2e7</Message></Error>" if code else ""
    return Response(text, status, content_type="application/xml")


def refuse(status: int, code: str) -> Answer:
    """The request is refused, and nothing done."""
    return lambda request, pass_on: error(status, code)


def cut(request: Request, pass_on: Callable[[], Response]) -> None:
    """The line is cut before anything is done."""


def lose_the_answer(request: Request, pass_on: Callable[[], Response]) -> None:
    """The request is carried out, and the line cut before the answer."""
    pass_on()


def refuse_afterwards(status: int, code: str) -> Answer:
    """The request is carried out, and called a failure."""
    def answer(request: Request, pass_on: Callable[[], Response]) -> Response:
        pass_on()
        return error(status, code)
    return answer


def break_tls(request: Request, pass_on: Callable[[], Response]) -> None:
    """The request is carried out, and the answer is no TLS."""
    pass_on()
    os.write(request.environ["werkzeug.socket"].fileno(), _NO_TLS)


def break_tls_within(request: Request, pass_on: Callable[[], Response]) -> Response:
    """The answer is TLS up to the middle of its body."""
    given = pass_on()
    body, line = given.get_data(), request.environ["werkzeug.socket"]

    def chunks() -> Iterator[bytes]:
        yield body[:len(body) // 2]
        os.write(line.fileno(), _NO_TLS)
    return _AsItIs(chunks(), given.status, given.headers.copy())


def change_the_body(change: Callable[[bytes], bytes]) -> Answer:
    """The answer's body is changed on the way; its headers, length included, are not."""
    def answer(request: Request, pass_on: Callable[[], Response]) -> Response:
        given = pass_on()
        headers = given.headers.copy()
        return _AsItIs(change(given.get_data()), given.status, headers)
    return answer


class _AsItIs(Response):
    automatically_set_content_length = False

    def get_wsgi_headers(self, environ: Any) -> Any:
        return self.headers


def _then_cut(chunks: Iterable[bytes], line: socket.socket) -> Iterator[bytes]:
    yield from chunks
    line.shutdown(socket.SHUT_WR)
