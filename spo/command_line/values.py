"""From a section of a config to a frozen dataclass that checks itself.

@dataclass(frozen=True)
class LoraSettings(Checked, section="lora"):
    rank: int = whole()
    reference: str = choice("base", "init")
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from spo.errors import UserError

Values = TypeVar("Values")


def fill(cls: type[Values], section: Mapping[str, Any], **others: Any) -> Values:
    """Builds the dataclass `cls` from the entries of `section` that have its fields' names.

    `others` are fields that the section does not have, or not in this form.
    """
    names = [f.name for f in fields(cls) if f.init and f.name not in others and f.name in section]
    return cls(**{name: section[name] for name in names}, **others)


class Checked:
    """Base of a dataclass whose fields are keys of a config section, each with its check."""

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "") -> None:
        cls._prefix = f"{section}." if section else ""

    def __post_init__(self) -> None:
        """Raises UserError that names the first key whose value does not hold."""
        for each in fields(self):
            if "check" in each.metadata:
                each.metadata["check"](self._prefix + each.name, getattr(self, each.name))


def number(wanted: str, holds: Callable[[float], bool]) -> Any:
    """Declares a field that is a finite number that holds, or None."""
    return field(metadata={"check": lambda key, v: require_number(key, v, wanted, holds)})


def whole(least: int = 1) -> Any:
    """Declares a field that is a whole number from `least`, or None."""
    return field(metadata={"check": lambda key, value: require_whole(key, value, least)})


# Declare a field that is a number above 0, or from 0; or None.
positive = partial(number, "above 0", lambda value: value > 0)
not_negative = partial(number, "0 or more", lambda value: value >= 0)


def choice(*choices: str) -> Any:
    """Declares a field that is one of `choices`, or None."""
    return field(metadata={"check": lambda key, value: require_choice(key, value, choices)})


def require_number(
    key: str, value: float | None, wanted: str, holds: Callable[[float], bool]
) -> None:
    """Raises UserError that names `key` unless the number is finite and holds; None passes."""
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise UserError(f"{key}: {value} must be {wanted}.")


def require_whole(key: str, value: int | None, least: int = 1) -> None:
    """Raises UserError that names `key` unless the number is at least `least`; None passes."""
    require_number(key, value, f"a whole number from {least}", lambda v: v >= least)


def require_choice(key: str, value: str | None, choices: Iterable[str]) -> None:
    """Raises UserError that names `key` unless `value` is one of `choices`; None passes."""
    if value is not None and value not in choices:
        raise UserError(f"{key}: {value!r} is none of {', '.join(choices)}.")


def expand(path: str | None) -> str | None:
    """Returns a path or Hub id with ~ replaced by the home folder; None stays None."""
    return None if path is None else os.path.expanduser(path)


def path(text: str) -> Path:
    """Returns the path in an argument of a command line, ~ replaced by the home folder."""
    return Path(os.path.expanduser(text))
