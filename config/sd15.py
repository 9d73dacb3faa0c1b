"""GradSPO on Stable Diffusion 1.5, the paper's main run: 4 x A100 80 GB.

bash launch_sd15.sh
"""

from config import base


def get_config():
    config = base.get_config()
    # 4 GPUs x 10, on any number of GPUs.
    config.sample.global_batch_size = 40
    config.train.global_batch_size = 40
    return config
