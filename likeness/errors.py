"""Every error Likeness raises on purpose.

    LikenessError
    ├── InputError        the user must act: photos, consent, a subject id        never retried      exit 2
    ├── RecipeError       the caller must act: recipe, settings, flags            never retried      exit 2
    ├── TransientError    a server or a disk hiccup                               retried, backoff   exit 1
    ├── ResourceError     out of memory, disk full                                once, smaller      exit 1
    └── IntegrityError    a digest does not hold, a file is not what it was       stop, page someone exit 1

A message says what was found, what was needed and what to do, and never holds another user's path, EXIF or a credential. A subject
who is *refused* is no error: the run completes with a Verdict. Foreign exceptions are translated once, at the edge, by `translated`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class LikenessError(Exception):
    """The root: `message` for people, `code` for programs."""

    code: ClassVar[str] = "likeness_error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InputError(LikenessError):
    """Something the user gave cannot be used; `cure` is part of the message."""

    code = "input"
    exit_code = 2


class RecipeError(LikenessError):
    """The caller asked for something that does not exist or does not fit together."""

    code = "recipe"
    exit_code = 2


class TransientError(LikenessError):
    """May well work in a moment: retried with backoff."""

    code = "transient"


class ResourceError(LikenessError):
    """Not enough memory or disk for this plan: retried once with a smaller one."""

    code = "resource"


class IntegrityError(LikenessError):
    """Bytes are not what their digest says, or a record contradicts another. Never retried."""

    code = "integrity"


class UnusablePhotos(InputError):
    """The set of photos cannot be used as it is."""

    code = "unusable_photos"


class ConsentMissing(InputError):
    """No consent is on record, or it was withdrawn."""

    code = "consent_missing"


class SubjectForgotten(InputError):
    """The subject has a tombstone: nothing about them may be made again."""

    code = "subject_forgotten"


class BadSettings(RecipeError):
    """likeness.toml, the environment or a flag holds something that cannot be: all problems at once."""

    code = "bad_settings"


class UnknownBase(RecipeError):
    """No base of that name in the catalogue, or its files are not here."""

    code = "unknown_base"


class NonFiniteLoss(RecipeError):
    """The loss became NaN or infinite: this recipe diverges on these photos."""

    code = "non_finite_loss"


class BadCheckpoint(IntegrityError):
    """A checkpoint is truncated, corrupt or of another training."""

    code = "bad_checkpoint"


class DigestMismatch(IntegrityError):
    """Stored bytes do not have the digest they are stored under."""

    code = "digest_mismatch"


class ClaimLost(TransientError):
    """Another worker took over this stage: what was made here is dropped."""

    code = "claim_lost"


class StillClaimed(TransientError):
    """Another worker is making this stage right now."""

    code = "still_claimed"


class ServerUnreachable(TransientError):
    """A store, registry or orchestration server does not answer."""

    code = "server_unreachable"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that memory ran out: on a GPU by its own exception, whose name is looked at so that this package needs no torch; on a CPU in words."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def error_of(code: str, message: str) -> LikenessError:
    """An error of the class that has this code; a plain LikenessError if none has."""
    classes = [LikenessError]
    for known in classes:
        if known.code == code:
            return known(message)
        classes += known.__subclasses__()
    return LikenessError(message)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Map foreign exceptions raised inside to one of the five branches.

    Args:
        doing: what was being done, for the message: "writing the adapter".
    """
    try:
        yield
    except LikenessError:
        raise
    except MemoryError as e:
        raise ResourceError(f"out of memory while {doing}: free memory, or choose a smaller batch") from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full while {doing}: free some space and run the same command again") from e
        if e.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise InputError(f"{e.strerror or 'not accessible'} while {doing}: check that the path exists and may be used") from e
        raise TransientError(f"{type(e).__name__} while {doing}: {e.strerror or 'input/output error'}; the same command may work in a moment") from e
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise ResourceError(f"the device is out of memory while {doing}: free memory on it, or choose a smaller batch") from e
        raise
