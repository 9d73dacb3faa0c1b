"""Parses command lines: `--config=FILE`, `--config.key=value`; errors are one line.

CONFIG = define_config("config/sd15.py")      # CONFIG.value is the config, locked
app.run(main, flags_parser=parse_flags)
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from spo.command_line.config_files import BASE, Base, leaves, load_config, suggest
from spo.errors import FAILED, UserError, in_one_line

# A line for every attempt to reach the Hub is too much; what fails in the end is an error of ours.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
# Before torch starts CUDA: less of the GPU's memory is lost between blocks. From torch 2.9 on the first
# name counts, before it the second.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
if not os.environ.keys() & {*_ALLOCATOR}:
    os.environ.update(dict.fromkeys(_ALLOCATOR, "expandable_segments:True"))

# absl lists a flag under the module that defines it: let that be the script, not this file.
flags.disclaim_key_flags()

FLAGS = flags.FLAGS
LAUNCHER_VARIABLE = "SPO_LAUNCHER_PID"  # set by spo.launch for the processes that it starts
# The process that started this one, if it was a launcher: spo.launch, torchrun or accelerate.
_LAUNCHER = os.getppid() if os.environ.keys() & {LAUNCHER_VARIABLE, "TORCHELASTIC_RUN_ID"} else None
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of one of several processes, as torchrun sets them
ERROR_LENGTH = 1500  # characters of a line on stderr
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


class _OrNone(flags.ArgumentParser):
    """An absl parser that also takes "None"; parse_flags checks that the key may be None."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument):
        try:
            return None if argument == "None" else self.parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self.flag_type()}") from None

    def flag_type(self) -> str:
        return self.parser.flag_type()


config_flags.register_flag_parser_for_type(float, _OrNone(flags.FloatParser()))
config_flags.register_flag_parser_for_type(int, _OrNone(flags.IntegerParser()))
config_flags.register_flag_parser_for_type(bool, _OrNone(flags.BooleanParser()))
config_flags.register_flag_parser_for_type(str, _OrNone(flags.ArgumentParser()))


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError into one line on stderr, of a machine's first process, and its exit status.

    Of several processes that spo.launch started, it prints the error of the one that failed first.
    """
    try:
        _join_the_others()
        yield
    except Exception as error:
        if not _left_to_launcher(error):
            if not isinstance(error, UserError):
                raise
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{error.label}: {in_one_line(error, ERROR_LENGTH)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", FAILED))


def _join_the_others() -> None:
    """Deletes what a cluster left of `NUMBERS`; raises UserError if a part of a group's is there."""
    needed = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    missing += [n for n in NUMBERS if n not in missing and not os.environ[n].isdecimal()]
    if not missing:
        return
    found = [name for name in NUMBERS if os.environ.pop(name, None) is not None]
    if {"RANK", "LOCAL_RANK"} <= {*found}:
        raise UserError(
            f"environment: {', '.join(found)} make this one of several processes, but without a proper "
            f"{', '.join(missing)} it cannot find the others: unset them, or start by spo.launch."
        )


def is_orphan() -> bool:
    """Tells if a launcher started this process and was killed."""
    return _LAUNCHER not in (None, os.getppid())


def _left_to_launcher(error: Exception) -> bool:
    """Writes `error` to the file that torch's launcher reads; False without spo.launch."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or LAUNCHER_VARIABLE not in os.environ or is_orphan():
        return False
    if not os.path.exists(file):  # else spo.launch.workers has written it
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    return True


def define_config(default: str, base: Base = BASE) -> flags.FlagHolder:
    """Defines the flag --config; after parse_flags its value is a locked ConfigDict.

    The config file `default` applies if the command line names none; `base` is load_config's.
    """
    holder = flags.DEFINE_string(
        "config",
        default,
        "Config file: a .py with get_config(), or the config.json of a run. "
        "--config.key=value changes one key of it, e.g. --config.seed=5.",
    )
    FLAGS["config"].base = base
    return holder


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line for `absl.app.run`; bad input is one line and exit status 2."""
    if "--help" in argv:
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    with exit_on_user_error():
        path, argv = _take_config_path(argv)
        said = overridden(argv)
        config = load_config(path or FLAGS["config"].default, FLAGS["config"].base, said)
        program, *positional = _lay_over(config, argv, FLAGS)
        if positional:
            raise UserError(f"unexpected argument {positional[0]!r}: settings are --key=value")
    return [program]


def overridden(argv: Iterable[str]) -> list[str]:
    """Returns the keys that a command line sets by --config.key=value."""
    return [match[1] for match in map(OVERRIDE.match, argv) if match]


def changed(config: ConfigDict, changes: str) -> ConfigDict:
    """Returns a copy of parse_flags' config with `changes`, "key=value,key=value".

    A .py file in front of them replaces the config but for what the command line sets by --config.
    Raises UserError for unknown keys and unfit values.
    """
    copy, items = deepcopy(config), re.split(r",(?=[\w.]+=)", changes)
    if items[0].endswith(".py") and "=" not in items[0]:
        copy = load_config(items[0])
        items[:1] = [f"{k}={v}" for k, v in FLAGS["config"].override_values.items()]
    for item in items:
        if "=" not in item:
            raise UserError(f"config: {item!r} is not of the form KEY=VALUE")
    _lay_over(copy, ["", *(f"--config.{item}" for item in items)], flags.FlagValues())
    return copy


def _lay_over(config: ConfigDict, argv: list[str], values: flags.FlagValues) -> list[str]:
    """Applies the overrides in `argv` to `config`; returns the arguments that are not flags."""
    known = list(leaves(config))
    # options.hpsv2.1.model, as errors write it, is options["hpsv2.1"].model.
    dotted = {re.sub(r'\["(.+?)"\]', r".\1", key): key for key in known}
    argv = [OVERRIDE.sub(lambda m: m[0].replace(m[1], dotted.get(m[1], m[1])), a) for a in argv]
    for match in filter(None, map(OVERRIDE.match, argv)):
        if match[1] not in known:
            raise UserError(f"config: unknown key {match[1]}{suggest(match[1], known)}")
    try:
        # Replaces define_config's flag, and defines a flag for each override.
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv, allow_override=True
        )
        positional = values(argv)
    except flags.Error as error:
        # absl says "flag --config.train.beta=x: expected float".
        raise UserError(str(error).replace("flag --config.", "config: ", 1)) from error
    optional = leaves(config, only_optional=True)
    for key, value in values["config"].override_values.items():
        if value is None and key not in optional:
            raise UserError(f"config: {key} cannot be None")
    return positional


def _take_config_path(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the last `--config=FILE` or `--config FILE` of `argv`, and the other arguments."""
    path, others, arguments = "", [], iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            others.append(argument)
            continue
        path = value if equals else next(arguments, "")
        if not path:
            raise UserError("--config needs a file, e.g. --config=config/sd15.py")
    return path, others
