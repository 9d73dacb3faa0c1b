"""Config files and command lines; every command imports it, so that any terminal prints any text."""

import io
import sys

# Characters that its encoding lacks are escaped, not an error in the middle of a run.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
