"""From a section of a config to a frozen dataclass that checks itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from spo.errors import UserError

Values = TypeVar("Values")


def fill(cls: type[Values], section: Mapping[str, Any], **others: Any) -> Values:
    """Builds the dataclass `cls` from the entries of `section` that have its fields' names.

    `others` are fields that the section does not have, or not in this form.
    """
    names = [f.name for f in fields(cls) if f.init and f.name not in others and f.name in section]
    return cls(**{name: section[name] for name in names}, **others)


def require_number(
    key: str, value: float | None, wanted: str, holds: Callable[[float], bool]
) -> None:
    """Raises UserError that names `key` unless the number is finite and holds; None passes."""
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise UserError(f"{key}: {value} must be {wanted}.")


def require_whole(key: str, value: int | None, least: int = 1) -> None:
    """Raises UserError that names `key` unless the number is at least `least`; None passes."""
    require_number(key, value, f"a whole number from {least}", lambda v: v >= least)


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError that names `key` unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{key}: {value!r} is none of {', '.join(choices)}.")


def expand(path: str | None) -> str | None:
    """Returns a path or Hub id with ~ replaced by the home folder; None stays None."""
    return None if path is None else os.path.expanduser(path)
