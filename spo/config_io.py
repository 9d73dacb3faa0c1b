"""Reading and writing configs: a file, overlaid on config/base.py, becomes a typed ConfigDict."""

import importlib.util
import json
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path

from ml_collections import ConfigDict

from spo.errors import UserError

REPO_ROOT = Path(__file__).resolve().parents[1]

# Numbers by default, but None has a meaning for them too.
ALSO_NONE = ("train.max_grad_norm", "train.clip_eps")


def load_config(path: str) -> tuple[ConfigDict, set[str]]:
    """A .py or .json config laid over config/base.py, and the keys in it that may be None.

    `path` is relative to the current folder, else to the repository. Raises UserError for a
    missing or broken file, and for keys and types that config/base.py does not have.
    """
    file = find_file(path)
    config, nullable = _base_config()
    values = _read_json(file) if file.suffix == ".json" else _run_python(file)
    _overlay(config, values, nullable, str(path))
    return config, nullable


def save_config(config: ConfigDict, path: Path) -> None:
    """Writes a config as JSON, in its own order, that load_config reads again."""
    path.write_text(config.to_json(indent=2) + "\n")


def find_file(path: str) -> Path:
    """`path` under the current folder, else under the repository; UserError if it is in neither."""
    for file in (Path(path), REPO_ROOT / path):
        if file.is_file():
            return file
    raise UserError(f"config: no such file: {path}")


def leaf_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all settings; an empty section, which may be filled at will, is one."""
    keys = []
    for name, value in config.items():
        if isinstance(value, ConfigDict) and value:
            keys += leaf_keys(value, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def suggest(key: str, keys: list[str]) -> str:
    """The end of an "unknown key" message: the key that may have been meant."""
    close = get_close_matches(key, keys, n=1)
    return f"; did you mean {close[0]}?" if close else ""
