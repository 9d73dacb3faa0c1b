"""Errors that are told in one line; every other exception is a bug and shows its traceback."""

from __future__ import annotations

from collections.abc import Sequence
from pickle import UnpicklingError

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


class RunError(UserError):
    """A run that cannot continue, for a reason that no check of its input could find."""

    exit_status = FAILED


class Stopped(UserError):
    """A run that a signal stopped: not a fault, but told by one line and an exit status, too."""

    exit_status = STOPPED
    label = "stopped"


def first_line(error: Exception) -> str:
    """Returns the first line of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: Exception) -> str:
    """Returns another library's message without line breaks, cut to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def named(prompts: Sequence[str]) -> str:
    """Returns a list of prompts for an error's line: the first four, shortened, and their number."""
    more = [f"and {len(prompts) - _NAMED} more"] if len(prompts) > _NAMED else []
    return ", ".join([*(repr(shortened(prompt)) for prompt in prompts[:_NAMED]), *more])


def shortened(prompt: str) -> str:
    """Returns a prompt cut to 80 characters."""
    return prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
