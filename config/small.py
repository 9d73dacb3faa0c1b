"""A UNet of 18 M parameters at 128 pixels: GradSPO's iteration in seconds on a CPU, to be measured.

python scripts/benchmark.py --config=config/small.py --random

It has an architecture and no weights, and so trains nothing; config/tiny.py does.
"""

from config import base


def get_config():
    config = base.get_config()
    config.mixed_precision = "no"
    config.pretrained.model = "assets/architectures/small"
    config.preference.checkpoint = "assets/tiny/spm.safetensors"
    config.preference.backbone = "assets/tiny/clip"
    config.preference.processor = "assets/tiny/clip"
    config.sample.batch_size = 2
    config.train.batch_size = 8
    return config
