"""The S3 server of `likeness up`: what it was given is there after it died. That it keeps S3's word: tests/likeness/test_s3.py, whose server it is."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest

from tests.servers import free_port

PART = 5 << 20


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Any, int]]:
    """(client, pid) of a server on a folder; it is killed at the end."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "flows.bucket", "--port", str(port), "--folder", str(folder), "--bucket", "likeness"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    client = boto3.session.Session().client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                client.list_buckets()
                break
            except botocore.exceptions.EndpointConnectionError:
                time.sleep(0.1)
        yield client, process.pid
    finally:
        process.kill()
        process.wait()


def contents(client: Any) -> dict[str, bytes]:
    return {o["Key"]: client.get_object(Bucket="likeness", Key=o["Key"])["Body"].read() for o in client.list_objects_v2(Bucket="likeness").get("Contents", ())}


def test_what_was_answered_is_there_after_a_kill(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, pid):
        client.put_object(Bucket="likeness", Key="a/1.json", Body=b"first", Metadata={"mark": "x"}, IfNoneMatch="*")
        etag = client.put_object(Bucket="likeness", Key="a/1.json", Body=b"second", Metadata={"mark": "y"})["ETag"]
        client.put_object(Bucket="likeness", Key="a/1.json", Body=b"line\nthird", Metadata={"mark": "z"}, IfMatch=etag)
        with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="likeness", Key="a/1.json", Body=b"late", IfMatch=etag)
        for key in ("b", "c", "d"):
            client.put_object(Bucket="likeness", Key=key, Body=key.encode())
        client.delete_object(Bucket="likeness", Key="b")
        client.delete_objects(Bucket="likeness", Delete={"Objects": [{"Key": "c"}]})
        upload = client.create_multipart_upload(Bucket="likeness", Key="big", Metadata={"mark": "m"})["UploadId"]
        parts = [{"PartNumber": n, "ETag": client.upload_part(Bucket="likeness", Key="big", UploadId=upload, PartNumber=n, Body=bytes([n]) * size)["ETag"]}
                 for n, size in ((1, PART), (2, 7))]
        client.complete_multipart_upload(Bucket="likeness", Key="big", UploadId=upload, MultipartUpload={"Parts": parts})
        before = contents(client)
        os.kill(pid, signal.SIGKILL)
    assert set(before) == {"a/1.json", "d", "big"}
    (next(p for p in tmp_path.glob("*/*")).parent / "half.part").write_bytes(b'{"key": "e", "meta')         # it was being written when the server died
    with serving(tmp_path) as (client, _):
        assert contents(client) == before == {"a/1.json": b"line\nthird", "d": b"d", "big": b"\1" * PART + b"\2" * 7}
        assert client.head_object(Bucket="likeness", Key="a/1.json")["Metadata"] == {"mark": "z"}
        assert client.head_object(Bucket="likeness", Key="big")["Metadata"] == {"mark": "m"}
        client.put_object(Bucket="likeness", Key="e", Body=b"e", IfNoneMatch="*")
        with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="likeness", Key="d", Body=b"late", IfNoneMatch="*")


def test_deleted_bytes_are_in_no_file(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, _):
        client.put_object(Bucket="likeness", Key="subjects/ada/1", Body=b"planted word")
        assert any(b"planted word" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())              # the test can fail
        client.delete_objects(Bucket="likeness", Delete={"Objects": [{"Key": "subjects/ada/1"}]})
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_name_is_found_in_its_own_file_alone(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, _):
        client.put_object(Bucket="likeness", Key="k" * 900, Body=b"a long key is no file name")
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert path.name == hashlib.sha256(b"k" * 900).hexdigest()
    assert json.loads(path.read_bytes().partition(b"\n")[0])["key"] == "k" * 900
