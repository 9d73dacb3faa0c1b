"""LPO (Zhang et al., NeurIPS 2025, arXiv 2502.01051) on Stable Diffusion 1.5: 4 x A100.

bash launch_sd15.sh --config=config/lpo_sd15.py

SPO's loss on candidates that a latent reward model judges as they are drawn, at every timestep.
"""

from config import base


def use_latent_reward(config):
    """The judge, from the first step on, and its thresholds."""
    config.preference.scorer = "latent_reward"
    config.preference.kwargs = {
        "checkpoint": "hf://casiatao/LRM/lrm_sd15",  # a folder, or hf://user/repo/folder
        "base": "",  # whose tokenizers and noise it was trained with; empty: SD1.5
        "guidance_scale": 7.5,  # inside the LRM; 1 turns it off
        "guide_stages": False,  # guides the features of the UNet's stages, too
        "dtype": "float16",  # of its networks; projections and scores are in float32
    }
    config.sample.branch_from = 0
    config.sample.score_batch_size = 20
    config.sample.threshold = None
    config.sample.threshold_schedule = "sigma"
    config.sample.threshold_min = 0.35
    config.sample.threshold_max = 0.5


def get_config():
    config = base.get_config()
    config.algorithm = "lpo"
    config.num_epochs = 5
    use_latent_reward(config)
    config.sample.batch_size = 5
    config.sample.global_batch_size = 20  # 4 GPUs x 5
    config.train.global_batch_size = 40  # 4 GPUs x 10
    config.train.beta = 500.0
    return config
