"""Exit statuses, and how they get past the process that started a training process.

0 done; 1 failed; 2 bad input; 75 stopped by a signal, everything saved.

torchrun and accelerate tell every status of a process but 0 in a report of their own and end with 1.
So a process that ends in good order leaves its status in a file that spo.launch named, and ends with 0.
"""

from __future__ import annotations

import os
from pathlib import Path

FILE_VARIABLE = "SPO_EXIT_STATUS_FILE"


def hand_over(status: int) -> int:
    """The status to exit with: 0 where spo.launch reads `status` from its file, else `status`."""
    path = os.environ.get(FILE_VARIABLE)
    if not path or status == 0:
        return status
    with open(path, "a") as file:  # of several processes, the first one counts
        file.write(f"{status}\n")
    return 0


def keep_status() -> None:
    """From here on this process ends with its own status, so that torchrun ends the others."""
    os.environ.pop(FILE_VARIABLE, None)


def note_handlers() -> None:
    """Tell spo.launch that from here on a signal lets this process save and end by itself."""
    if path := os.environ.get(FILE_VARIABLE):
        _handlers(Path(path)).touch()


def has_handlers(path: Path) -> bool:
    """Whether a process of the run, whose statuses go to the file `path`, came as far as that."""
    return _handlers(path).exists()


def _handlers(path: Path) -> Path:
    return path.with_name(f"{path.name}.handlers")


def handed_over(path: Path) -> int:
    """The status that the processes of a run left in the file `path`; 0 where they left none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[0]) if lines else 0
