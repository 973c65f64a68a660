"""`likeness inspect` as a user has it: the table, the document, the contact sheet, from a folder and from the store."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from likeness.store import LocalStore


def inspect(root: Path, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flows.cli", "inspect", *words], cwd=root, env={"PATH": "", "HOME": str(home), "LIKENESS_HOME": str(home), "COLUMNS": "200"},
                          capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.timeout(900)
def test_the_contact_sheet_and_the_document_say_the_same_and_nothing_is_kept(root: Path, tmp_path: Path) -> None:
    photos, home, sheet = tmp_path / "photos", tmp_path / "home", tmp_path / "sheet.html"
    photos.mkdir()
    for file in sorted((root / "examples" / "demo").glob("*.jpg"))[:6]:
        (photos / file.name).write_bytes(file.read_bytes())
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    done = inspect(root, home, str(photos), "--json", "--html", str(sheet))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    html = sheet.read_text()
    assert stat.S_IMODE(sheet.stat().st_mode) == 0o600           # it shows a person
    assert html.count("data:image/webp") == 6
    for judged in document["photos"]:
        assert judged["name"] in html
    estimate = document["estimate"]
    assert 0 < estimate["low"] < estimate["accepted"] < estimate["high"] < 1
    assert estimate["photos"] == 6
    assert estimate["message"].capitalize()[:40] in html
    assert not (home / "store").exists()

    store = LocalStore(home / "store")
    for file in photos.iterdir():
        store.put_if_absent(f"uploads/ada/{file.name}", file.read_bytes())
    assert json.loads(inspect(root, home, "store:uploads/ada/", "--json").stdout) == document
    assert inspect(root, home, "store:uploads/ada", "--json").returncode == 2
    lost = inspect(root, home, str(photos), "--html", str(tmp_path / "nowhere" / "sheet.html"))
    assert (lost.returncode, "contact sheet" in lost.stderr) == (2, True)
