"""The error tree, and the one place where foreign errors are translated."""

from __future__ import annotations

import errno
import inspect

import pytest

from likeness import errors
from likeness.errors import InputError, IntegrityError, LikenessError, RecipeError, ResourceError, TransientError, translated

BRANCHES = (InputError, RecipeError, TransientError, ResourceError, IntegrityError)
ALL = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, LikenessError) and e is not LikenessError]


class OutOfMemoryError(RuntimeError):
    """Called as torch's own is."""


def test_every_error_is_in_exactly_one_branch_and_has_its_own_code() -> None:
    for error in ALL:
        assert sum(issubclass(error, branch) for branch in BRANCHES) == 1, error
    assert len({error.code for error in ALL}) == len(ALL)


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.__name__)
def test_exit_codes_are_those_of_the_branch(error: type[LikenessError]) -> None:
    assert error.exit_code == (2 if issubclass(error, InputError | RecipeError) else 1)
    assert error("why").message == str(error("why")) == "why"


@pytest.mark.parametrize(("foreign", "branch", "words"), [
    (OSError(errno.ENOSPC, "No space left on device"), ResourceError, "the disk is full while writing x: free some space"),
    (OSError(errno.EDQUOT, "Quota"), ResourceError, "disk is full"),
    (MemoryError(), ResourceError, "out of memory while writing x"),
    (OutOfMemoryError("CUDA"), ResourceError, "the device is out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), ResourceError, "device is out of memory"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/home/ada/secret.png"), InputError, "No such file or directory while writing x"),
    (PermissionError(errno.EACCES, "Permission denied", "/home/ada/secret.png"), InputError, "Permission denied while writing x"),
    (OSError(errno.EIO, "Input/output error", "/home/ada/secret.png"), TransientError, "OSError while writing x"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), TransientError, "ConnectionResetError"),
    (TimeoutError(), TransientError, "input/output error"),
], ids=["disk", "quota", "memory", "gpu", "allocator", "absent", "forbidden", "io", "reset", "timeout"])
def test_foreign_errors_become_ours_and_keep_their_cause(foreign: Exception, branch: type[LikenessError], words: str) -> None:
    with pytest.raises(branch, match=words) as caught, translated("writing x"):
        raise foreign
    assert caught.value.__cause__ is foreign
    assert "ada" not in caught.value.message


@pytest.mark.parametrize("mine", [errors.ClaimLost("lost"), ValueError("a bug"), RuntimeError("a bug"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_our_own_errors_and_bugs_pass_through(mine: BaseException) -> None:
    with pytest.raises(type(mine)) as caught, translated("writing x"):
        raise mine
    assert caught.value is mine
