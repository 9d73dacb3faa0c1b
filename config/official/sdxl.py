"""GradSPO on SDXL as the official code runs it, where that departs from the paper."""

from config import sdxl


def get_config():
    config = sdxl.get_config()
    config.train.max_grad_norm = None
    config.train.ema_every = "window"
    config.sample.final_step = "extend"
    config.sample.final_direction = "last"
    return config
