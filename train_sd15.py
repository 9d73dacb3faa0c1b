"""Trains Stable Diffusion 1.5; `bash launch_sd15.sh` runs this on every GPU.

python train_sd15.py [--config=config/spo_sd15.py] [--config.train.beta=5 ...]
"""

from absl import app

from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/sd15.py")


def main(_):
    from spo.method.start import train  # a bad command line fails before torch loads

    with exit_on_user_error():
        train(CONFIG.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
