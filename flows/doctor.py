"""doctor: probe, on the machine itself, everything that a run needs."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np

from likeness.errors import IntegrityError, LikenessError
from likeness.settings import Settings
from tasks.runtime import Tools


def probe(settings: Settings) -> list[tuple[str, bool, str]]:
    """(what, whether it works, words) of every check; a check that breaks is a check that failed."""
    tools = Tools(settings)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("store", lambda: _store(tools)), ("base", lambda: f"{tools.base_ref.name}, {len(tools.base_ref.files)} files, revision {tools.base_ref.revision[:12]}"),
        ("faces", lambda: _faces(tools)), ("impostor bank", lambda: f"{len(tools.bank.embeddings)} identities for {tools.bank.backend}"),
        ("class pictures", lambda: f"{len(tools.class_pictures('person')[1])} pictures"), ("registry", lambda: _registry(tools))]
    results = []
    for name, check in checks:
        try:
            results.append((name, True, check()))
        except LikenessError as e:
            results.append((name, False, e.message))
        except Exception as e:
            results.append((name, False, f"{type(e).__name__}: {e}"))
    return results


def _store(tools: Tools) -> str:
    store, key = tools.store, f"probes/{secrets.token_hex(8)}"
    try:
        if not store.put_if_absent(key, b"a") or store.put_if_absent(key, b"b") or store.get(key) != b"a":
            raise IntegrityError("the store does not create exclusively: two workers would do the same work")
        if store.compare_and_swap(key, expected=b"b", new=b"c") or not store.compare_and_swap(key, expected=b"a", new=b"c") or store.get(key) != b"c":
            raise IntegrityError("the store does not compare and swap: claims would not hold")
    finally:
        store.delete(key)
    return f"{tools.settings.store.kind}: creates exclusively, swaps by comparison"


def _faces(tools: Tools) -> str:
    grey = np.full((256, 256, 3), 128, np.uint8)
    if tools.faces.find_faces(grey):
        raise IntegrityError("the detector sees a face on a grey wall: install the face backend again")
    tools.faces.embed_faces(grey, [])
    return f"{tools.faces.name} loads and sees no face on a grey wall; licence: {tools.faces.licence}"


def _registry(tools: Tools) -> str:
    return f"answers; {len(tools.registry.client.search_registered_models(max_results=100))} registered models on the first page"
