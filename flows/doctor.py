"""doctor: probe, on the machine itself, everything that a run needs."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from likeness.errors import IntegrityError, LikenessError, RecipeError
from likeness.settings import Settings
from likeness.store import Store
from tasks.runtime import Tools

CONTENDERS = 8


def probe(settings: Settings) -> list[tuple[str, bool, str]]:
    """(what, whether it works, words) of every check; a check that breaks is a check that failed."""
    tools = Tools(settings)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("store", lambda: _store(tools)), ("base", lambda: f"{tools.base_ref.name}, {len(tools.base_ref.files)} files, revision {tools.base_ref.revision[:12]}"),
        ("faces", lambda: _faces(tools)), ("captions", lambda: _captions(tools)),
        ("impostor bank", lambda: f"{len(tools.bank.embeddings)} identities for {tools.bank.backend}"),
        ("class pictures", lambda: _class_pictures(tools)), ("registry", lambda: _registry(tools))]
    results = []
    for name, check in checks:
        try:
            results.append((name, True, check()))
        except LikenessError as e:
            results.append((name, False, e.message))
        except Exception as e:
            results.append((name, False, f"{type(e).__name__}: {e}"))
    return results


def _class_pictures(tools: Tools) -> str:
    wanted = any(recipe.objective.wants_class_pictures for recipe in (tools.settings.recipe, *tools.settings.ladder))
    shipped = len(tools.shipped_class_pictures("person")[1])
    return "no recipe wants any" if not wanted else f"{shipped} pictures" if shipped else "none ship for this base: the first training draws them, once for each class noun"


def _store(tools: Tools) -> str:
    store, key = tools.bare_store, f"probes/{secrets.token_hex(8)}"
    if not store.put_if_absent(key, b"a"):
        raise IntegrityError("the store says that a key which nobody used exists: claims would not hold")
    try:
        if store.put_if_absent(key, b"b") or store.get(key) != b"a" or not _one_wins(lambda mine: store.put_if_absent(f"{key}-raced", mine)):
            raise IntegrityError("the store does not create exclusively: two workers would do the same work")
        if store.compare_and_swap(key, expected=b"b", new=b"c") or not store.compare_and_swap(key, expected=b"a", new=b"c") or store.get(key) != b"c" \
                or not _one_wins(lambda mine: store.compare_and_swap(key, expected=b"c", new=mine)):
            raise IntegrityError("the store does not compare and swap: claims would not hold")
        if key not in store.list("probes/"):
            raise IntegrityError("the store does not list what was just written: erasing a person would miss things")
    finally:
        store.delete(key)
        store.delete(f"{key}-raced")
    return f"{tools.settings.store.kind}: creates exclusively, swaps by comparison, also when {CONTENDERS} do so at once{_old_versions(store)}"


def _one_wins(attempt: Callable[[bytes], bool]) -> bool:
    """Whether exactly one of several simultaneous attempts succeeds. A server that looks first and writes later is caught often, not always."""
    start = threading.Barrier(CONTENDERS)

    def contend(n: int) -> bool:
        start.wait()
        return attempt(b"contender %d" % n)

    with ThreadPoolExecutor(CONTENDERS) as pool:
        return sum(pool.map(contend, range(CONTENDERS))) == 1


def _old_versions(store: Store) -> str:
    from likeness.s3 import S3Store

    if not isinstance(store, S3Store):
        return ""
    try:
        return "; the bucket keeps old versions, so that `forget` erases nothing there until they expire: docs/store.md" if store.versioned() else ""
    except RecipeError:
        return "; whether the bucket keeps old versions may not be asked (s3:GetBucketVersioning)"


def _faces(tools: Tools) -> str:
    grey = np.full((256, 256, 3), 128, np.uint8)
    if tools.faces.find_faces(grey):
        raise IntegrityError("the detector sees a face on a grey wall: install the face backend again")
    tools.faces.embed_faces(grey, [])
    return f"{tools.faces.name} loads and sees no face on a grey wall; licence: {tools.faces.licence}"


def _captions(tools: Tools) -> str:
    [(text, _, _)] = tools.captioner.captions(np.full((1, 128, 128, 3), 128, np.uint8), who="nobody")
    files = tools.captioner_params.get("files")
    of = "the maquette's own CLIP" if files is None else f"{len(files)} files"
    return f"{tools.settings.backends.captions}, {of}, loads; of a grey wall it says: {text}"


def _registry(tools: Tools) -> str:
    return f"answers; {len(tools.registry.client.search_registered_models(max_results=100))} registered models on the first page"
