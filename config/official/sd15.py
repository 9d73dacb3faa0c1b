"""GradSPO on SD1.5 as the official code runs it, where that departs from the paper."""

from config import sd15


def get_config():
    config = sd15.get_config()
    config.train.max_grad_norm = None
    config.train.ema_every = "window"
    config.sample.keep_all_final = True
    config.sample.final_score_timestep = "t"
    return config
