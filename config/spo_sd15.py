"""SPO (the baseline GradSPO builds on) on Stable Diffusion 1.5.

bash launch_sd15.sh --config=config/spo_sd15.py
"""

from config import sd15


def get_config():
    config = sd15.get_config()
    config.algorithm = "spo"
    return config
