"""Errors that are told in one line; every other exception is a bug and shows its traceback."""

from spo.launch.exit_status import STOPPED


class UserError(Exception):
    """Bad config, file or data; the message names the key or file and says what to do."""

    exit_status = 2
    label = "error"  # begins the line


class RunError(UserError):
    """A run that cannot go on, for no fault in its input that could have been seen before."""

    exit_status = 1


class Stopped(UserError):
    """A run that a signal stopped; no fault, but its line and exit status are told the same way."""

    exit_status = STOPPED
    label = "stopped"
