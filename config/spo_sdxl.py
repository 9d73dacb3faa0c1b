"""SPO (the baseline GradSPO builds on) on SDXL 1.0.

bash launch_sdxl.sh --config=config/spo_sdxl.py
"""

from config import sdxl


def get_config():
    config = sdxl.get_config()
    config.algorithm = "spo"
    config.sample.num_candidates = 2
    config.sample.num_inner_steps = 3
    config.train.batch_size = 2  # x 2 accumulation steps on 4 GPUs
    return config
