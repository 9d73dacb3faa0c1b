"""Errors that are told in one line; every other exception is a bug and shows its traceback."""

from collections.abc import Callable, Iterable, Sequence
from pickle import UnpicklingError
from typing import TypeVar

from safetensors import SafetensorError

FAILED, BAD_INPUT = 1, 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the run can be taken up again

# What from_pretrained raises for files that are missing, damaged or of another shape.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError)
_LONGEST = 300  # characters of another library's message
_NAMED = 4  # prompts that an error names


class UserError(Exception):
    """Bad config, file or data; the message names the key or file and says what to do."""

    exit_status = BAD_INPUT
    label = "error"  # begins the line


class Unavailable(UserError):
    """A repo, file or address that does not answer as it should; another source may."""


Place, Found = TypeVar("Place"), TypeVar("Found")


def first_available(
    places: Iterable[Place], read: Callable[[Place], Found]
) -> tuple[Found | None, list[str]]:
    """Returns what `read` gives of the first place that answers, and why each before it does not."""
    failed: list[str] = []
    for place in places:
        try:
            return read(place), failed
        except Unavailable as error:
            failed.append(str(error))
    return None, failed


class RunError(UserError):
    """A run that cannot continue, for a reason that no check of its input could find."""

    exit_status = FAILED


class WriteError(RunError, OSError):
    """A file that cannot be written: WriteError(errno, strerror, filename)."""

    def __str__(self) -> str:
        reason = f"cannot write {self.filename}: {self.strerror}"
        return f"{reason}; mend that, then give the same command again."


class Stopped(UserError):
    """A run that a signal stopped: not a fault, but told by one line and an exit status, too."""

    exit_status = STOPPED
    label = "stopped"


def first_line(error: Exception) -> str:
    """Returns the first line of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(message: object, longest: int = _LONGEST) -> str:
    """Returns a message without line breaks and control characters, without its middle if too long."""
    text = " ".join(str(message).split()) or type(message).__name__
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return (
        shown
        if len(shown) <= longest
        else f"{shown[: longest * 3 // 4]} … {shown[-longest // 4 :]}"
    )


def named(prompts: Sequence[str]) -> str:
    """Returns a list of prompts for an error's line: the first four, shortened, and their number."""
    more = [f"and {len(prompts) - _NAMED} more"] if len(prompts) > _NAMED else []
    return ", ".join([*(repr(shortened(prompt)) for prompt in prompts[:_NAMED]), *more])


def shortened(prompt: str) -> str:
    """Returns a prompt cut to 80 characters."""
    return prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
