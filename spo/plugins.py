"""Alternatives by name: an entry of a plain dict, or "module:name" of the user's own code."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from spo.errors import UserError


def algorithm_name(name: str) -> str:
    """Returns a short name for "module:name": the name, or the module if all modules share the name."""
    module, _, attribute = name.rpartition(":")
    return module.rpartition(".")[2] if attribute in ("loss", "make", "objective") else attribute


def find(name: str, table: Mapping[str, Any], key: str) -> Any:
    """`table[name]`, or what "module:name" names; UserError naming config `key` where there is none."""
    if name in table:
        return table[name]
    known = ", ".join(table)
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{key}: {name!r} is none of {known}, nor a dotted path module:name.")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}: cannot import {name!r}: {error}") from error
