"""Errors that a user can act on: each message says what was expected, what was found, and what to do next."""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")


class KVUtilsError(Exception):
    """Base class of every error that kvutils raises on purpose."""


class ModelError(KVUtilsError):
    """An unknown, incomplete or unsupported model."""


class ImageError(KVUtilsError):
    """A picture that cannot be opened or cannot be used."""


class DataError(KVUtilsError):
    """A data set that is missing, half extracted or malformed."""


class ParameterError(KVUtilsError):
    """An unknown or impossible argument: a layer that the model lacks, a prompt without its image, a parameter of a command."""


class MemoryLimitError(KVUtilsError):
    """A single image that does not fit the memory of the device."""


class StoreError(KVUtilsError):
    """A stored file that is missing, truncated or does not match its checksum."""


def not_written(what: object, reason: object) -> StoreError:
    """The error for a file that could not be written; raise it."""
    return StoreError(f"{what} could not be written ({reason}). What was stored before is untouched. Free some space, mend the permissions "
                      "or name another folder (KVUTILS_OUT, KVUTILS_CACHE, KVUTILS_DATA, HF_HOME), and run again: it resumes.")  # fmt: skip


@contextmanager
def writing(what: str) -> Iterator[None]:
    """`not_written` in place of an error of the block, of whatever kind, behind which there is a full or locked disk."""
    try:
        yield
    except Exception as error:
        reason: BaseException | None = error
        while reason and getattr(reason, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            reason = reason.__cause__ or reason.__context__
        if reason is None:
            raise
        raise not_written(what, reason) from error


def at_least(name: str, value: object, least: int = 1) -> None:
    """ParameterError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ParameterError(f"{name} must be a whole number of at least {least}, not {value!r}")


def of_kind(what: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """ParameterError unless `value` is of one of the types. expected: what should be there, and what gives it."""
    if not isinstance(value, kinds):
        raise ParameterError(f"{what}: expected {expected}, found {type(value).__name__} {str(value)[:60]!r}")


def one_of(what: str, value: object, choices: Iterable, kind: type[KVUtilsError] | None = None) -> None:
    """An error of `kind` (default ParameterError) that names the choices, and the nearest, unless `value` is one of them."""
    choices = list(choices)
    if value not in choices:
        near = get_close_matches(str(value), map(str, choices), 1)
        hint = f" (did you mean {next(each for each in choices if str(each) == near[0])!r}?)" if near else ""
        raise (kind or ParameterError)(f"unknown {what} {value!r}{hint}; expected one of {', '.join(map(str, choices))}")


def ask_hub(repository: str, ask: Callable[[], T]) -> T:
    """What the hub answers; DataError where it does not, or does not know the repository or its revision."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError  # the errors themselves stay light
    try:
        return ask()
    except Exception as error:  # of which kind depends on the HTTP library that huggingface_hub brings
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, GatedRepoError):
            raise DataError(f"{repository} is open to those alone who have accepted its terms: do so on its page, then `hf auth login`") from error
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            what = "revision of it" if isinstance(error, RevisionNotFoundError) else "such repository"
            raise DataError(f"{repository}: the hub knows no {what}; is it spelt right? (a private one needs `hf auth login`)") from error
        raise DataError(f"{repository} cannot be looked up on the hub ({said}): that needs network, or a copy here") from error
