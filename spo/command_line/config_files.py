"""Reads and writes configs: a config file, laid over a base, becomes a typed ConfigDict.

A base (BASE, SPM_BASE or EVAL_BASE) has every key of a script with its default and its type. A key
whose default is a placeholder or a FieldReference may also be None; every other key may not.
"""

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from spo.atomic import write_file
from spo.errors import UserError
from spo.plugins import names_code

REPO_ROOT = Path(__file__).resolve().parents[2]
BASE = "config/base.py"
SPM_BASE = "config/spm_base.py"
EVAL_BASE = "config/eval_base.py"
# A base, or a function that chooses one by the top-level keys of the config file.
Base = str | Callable[[Collection[str]], str]


def load_config(path: str, base: Base = BASE, said: Collection[str] | None = None) -> ConfigDict:
    """Returns `base` with the values of a .py or .json config file.

    `path` is relative to the current folder, else to the repository. Raises UserError for a
    missing or broken file, and for keys and types that the base does not have; with `said`, the keys
    that a command line sets, also for a .json file that names code under another key.
    """
    # Config files import each other as `from config import base`, whatever the current folder.
    if str(REPO_ROOT) not in sys.path:
        sys.path.insert(0, str(REPO_ROOT))
    file = _find(path)
    # By the name that the user gave: a link's target may have another suffix.
    values = _read_json(file) if path.endswith(".json") else _run_python(file).to_dict()
    base = base(values) if callable(base) else base
    config = _run_python(REPO_ROOT / base)
    _overlay(config, values, path, base)
    if said is not None and path.endswith(".json"):
        _refuse_code(values, path, said)
    return config


def _refuse_code(values: dict, path: str, said: Collection[str]) -> None:
    """Raises UserError if a key that is not in `said` names code: `path` may be somebody else's."""
    for key, text in _texts(values):
        if names_code(text) and not any(f"{key}.".startswith(f"{name}.") for name in said):
            raise UserError(
                f"{key}: {text!r} in {path} may be code, which a .json file alone does not run; if you "
                f"trust it, say it on the command line, too: --config.{key}={text}"
            )


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text in a value of a .json file, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else (("", v) for v in value):
            yield from _texts(item, ".".join(filter(None, (key, name))))


def save_config(values: Mapping[str, Any], path: Path) -> None:
    """Writes a config, as plain values, as JSON; load_config reads it back."""
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def leaves(config: ConfigDict, only_optional: bool = False) -> dict[str, object]:
    """Returns all settings, or only settings that may be None, by their dotted names.

    An empty section counts as a setting. A key with dots stands in brackets: options["hpsv2.1"].model.
    """
    found = {}
    for name, value in config.items(preserve_field_references=True):
        name = f'["{name}"]' if "." in name else name
        if _is_section(value):
            section = leaves(value, only_optional)
            found |= {f"{name}.{key}".replace(".[", "["): v for key, v in section.items()}
        elif isinstance(value, FieldReference):
            found[name] = value.get()
        elif not only_optional:
            found[name] = value
    return found


def check_leaves(settings: Mapping[str, object]) -> None:
    """Raises UserError for a number or text that is too large or malformed for any of `leaves`."""
    for key, value in settings.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, int) and abs(item) >= 2**63:
                raise UserError(f"{key}: the number is too large.")
            if isinstance(item, str):
                _check_text(key, item)


def _check_text(key: str, text: str) -> None:
    """Raises UserError if the file system rejects `text` as a path: most texts may be one."""
    try:
        text.encode()  # what is no UTF-8 cannot be written into configs and files of weights
        Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {text[:100]!r} cannot be a path ({reason}).") from error


def suggest(key: str, known: list[str]) -> str:
    """Returns the end of a message about an unknown key: the known key that was probably meant."""
    close = [name for name in known if name.endswith(f".{key}")] or get_close_matches(key, known)
    return f"; did you mean {close[0]}?" if close else ""


def _is_section(value: object) -> bool:
    return isinstance(value, ConfigDict) and len(value) > 0


def _find(path: str) -> Path:
    _check_text("config", path)
    for file in (Path(path).expanduser(), REPO_ROOT / path):
        if file.suffix in (".py", ".json") and file.is_file():
            return file.resolve()
    raise UserError(f"config: no such .py or .json file: {path}")


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a config is a JSON object, as save_config writes it")
    return values


def _run_python(file: Path) -> ConfigDict:
    """Returns what get_config() of a config file returns; raises a UserError that names the line."""
    spec = importlib.util.spec_from_file_location("spo_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        place = f"{file}, line {lines[-1]}" if lines else str(file)
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}, not a ConfigDict")
    return config


def _overlay(config: ConfigDict, values: dict, source: str, base: str, prefix: str = "") -> None:
    """Sets `values` of the file `source` on `config` in place; raises UserError as `load_config`."""
    optional = leaves(config, only_optional=True)
    for name, value in values.items():
        key = prefix + name
        if name not in config:
            hint = suggest(key, [prefix + other for other in leaves(config)])
            hint = hint or f"; this script takes the keys of {base}"
            raise UserError(f"{source}: unknown key {key}{hint}")
        if _is_section(config[name]) and isinstance(value, dict):
            _overlay(config[name], value, source, base, f"{key}.")
            continue
        expected = config.get_type(name)
        try:
            # ml_collections itself takes None anywhere, and true as a number.
            if (value is None and name not in optional) or (type(value) is bool is not expected):
                raise TypeError
            if isinstance(config[name], ConfigDict) and isinstance(value, dict):
                config[name].update(value)  # keeps whether its keys may have dots
            else:
                config[name] = value
        except (TypeError, ValueError, OverflowError) as error:
            message = f"{source}: {key} = {value!r}: expected {expected.__name__}"
            raise UserError(message) from error
