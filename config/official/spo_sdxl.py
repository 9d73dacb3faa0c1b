"""SPO on SDXL as the official code runs it, where that departs from the paper."""

from config import spo_sdxl


def get_config():
    config = spo_sdxl.get_config()
    config.train.max_grad_norm = None
    config.sample.final_step = "extend"
    return config
