"""config/small.py judged by a latent reward model, at every step as in LPO.

python scripts/benchmark.py --config=config/small.py --random --compare=config/small_lrm.py

Its judge is the down path and the middle of the same UNet, and its text encoder.
"""

from config import small


def get_config():
    config = small.get_config()
    config.preference.scorer = "latent_reward"
    config.preference.kwargs = {"checkpoint": config.pretrained.model, "guidance_scale": 7.5}
    config.sample.branch_from = 0
    config.sample.score_batch_size = config.sample.decode_batch_size
    return config
