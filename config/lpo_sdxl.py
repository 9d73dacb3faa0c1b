"""LPO (Zhang et al., NeurIPS 2025, arXiv 2502.01051) on SDXL 1.0: 4 x A100.

bash launch_sdxl.sh --config=config/lpo_sdxl.py
"""

from config import lpo_sd15, sdxl


def use_latent_reward(config):
    """The judge, from the first step on, and its thresholds."""
    lpo_sd15.use_latent_reward(config)
    config.preference.kwargs.checkpoint = "hf://casiatao/LRM/lrm_sdxl"
    config.sample.score_batch_size = 16
    config.sample.threshold_min = 0.45
    config.sample.threshold_max = 0.6


def get_config():
    config = sdxl.get_config()
    config.algorithm = "lpo"
    config.num_epochs = 5
    use_latent_reward(config)
    config.sample.batch_size = 4
    config.sample.global_batch_size = 16  # 4 GPUs x 4
    config.train.batch_size = 4  # 4 GPUs x 4
    config.train.gradient_checkpointing = True
    config.train.beta = 500.0
    return config
