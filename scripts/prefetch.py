"""Downloads everything that a config needs, and checks it by loading it.

    python scripts/prefetch.py --config=config/sdxl.py
    python scripts/prefetch.py --config=config/spm_sdxl.py
    python scripts/prefetch.py --config=config/eval_sdxl.py

Afterwards the run works offline (HF_HUB_OFFLINE=1).
"""

from collections.abc import Collection

from absl import app

from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags


def base_of(keys: Collection[str]) -> str:
    """Returns the base of a config: evaluations have `models`, preference models have `data`."""
    return EVAL_BASE if "models" in keys else SPM_BASE if "data" in keys else BASE


CONFIG = define_config("config/sd15.py", base=base_of)


def main(_) -> None:
    with exit_on_user_error():
        from spo.run.prefetch import prefetch  # torch takes seconds to load

        for line in prefetch(CONFIG.value):
            print(line)
        print("Everything is there.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
