"""Trains a step-aware preference model; `bash launch_spm.sh` runs this on every GPU.

python scripts/train_preference_model.py [--config=config/spm_sdxl.py] [--config.train.key=...]
"""

from absl import app

from spo.command_line.config_files import SPM_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags
from spo.launch.batch_plan import plan_updates

CONFIG = define_config("config/spm_sd15.py", SPM_BASE)
# How spo.launch checks the config.
PLAN = plan_updates
PREFLIGHT = "spo.preference.spm_recipe:check_training"


def main(_):
    # A bad command line fails before torch loads.
    from spo.preference.spm_trainer import train_preference_model

    with exit_on_user_error():
        train_preference_model(CONFIG.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
