"""Errors that are told in one line; every other exception is a bug and shows its traceback."""


class UserError(Exception):
    """Bad config, file or data; the message names the key or file and says what to do."""

    exit_status = 2


class RunError(UserError):
    """A run that cannot go on, for no fault in its input that could have been seen before."""

    exit_status = 1
