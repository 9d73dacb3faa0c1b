"""Finds alternatives by name: an entry of a plain dict, or "module:name" of the user's code."""

import importlib
from collections.abc import Mapping
from typing import Any

from spo.errors import UserError

_GENERIC = ("objective", "loss", "make")  # attributes that do not say which algorithm they hold


def names_code(text: str) -> bool:
    """Returns whether `text` has the form module:name, which is all that `find` imports."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def find(name: str, table: Mapping[str, Any], key: str) -> Any:
    """Returns `table[name]` or the object "module:name"; raises UserError that names config `key`."""
    if name in table:
        return table[name]
    if not names_code(name):
        known = ", ".join(table)
        raise UserError(f"{key}: {name!r} is none of {known}, nor a dotted path module:name.")
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}: cannot import {name!r}: {error}") from error


def algorithm_name(algorithm: str) -> str:
    """Returns the name that run folders, model cards and Hub tags give to `config.algorithm`.

    "gradspo" is its own name; "package.module:name" is called "name", or "module" if the name is
    generic.
    """
    module, _, name = algorithm.rpartition(":")
    return module.rpartition(".")[2] if module and name in _GENERIC else name
