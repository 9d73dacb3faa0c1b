"""Trains a step-aware preference model; `bash launch_spm.sh` runs this on every GPU.

python scripts/train_preference_model.py [--config=config/spm_sdxl.py] [--config.train.key=...]
"""

from absl import app

from spo.command_line.config_files import SPM_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/spm_sd15.py", base=SPM_BASE)


def main(_):
    # A bad command line fails before torch loads.
    from spo.preference.pair_trainer import train_preference_model

    with exit_on_user_error():
        train_preference_model(CONFIG.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
