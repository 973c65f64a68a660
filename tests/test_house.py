"""The walls of the house: what a package may pull in, and that tests cannot reach outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1].split(","):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
print(" ".join(sorted(set(sys.argv[2].split(",")) & set(sys.modules))))
"""


@pytest.mark.parametrize(("packages", "forbidden"), [
    ("likeness", "torch,torchvision,diffusers,transformers,prefect,dlib"),
    ("likeness,models", "prefect"),      # mlflow and boto3 are imported by packages that we build on, when installed
], ids=["likeness is light", "models know no scheduler"])
def test_importing_a_package_does_not_pull_in(root: Path, packages: str, forbidden: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, packages, forbidden], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
def test_tests_cannot_leave_this_machine(connect: str) -> None:
    # 192.0.2.0/24 is reserved for documentation: were the guard gone, this would hang or be refused, never reach anybody
    with socket.socket() as sock:
        sock.settimeout(0.2)
        with pytest.raises(RuntimeError, match=r"192\.0\.2\.1:443"):
            getattr(sock, connect)(("192.0.2.1", 443))


def test_this_machine_can_be_reached() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())


def test_tests_cannot_touch_a_real_home(own_home: Path, tmp_path: Path) -> None:
    assert os.environ["LIKENESS_HOME"] == str(own_home)
    assert own_home.is_relative_to(tmp_path)
    assert "likeness-tests-" in str(Path.home())
    assert "likeness-tests-" in os.environ["PREFECT_HOME"]


def test_no_package_below_tests(root: Path) -> None:
    assert list((root / "tests").rglob("__init__.py")) == []
