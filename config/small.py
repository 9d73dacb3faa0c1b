"""A UNet of 18 M parameters at 256 pixels: GradSPO's iteration in seconds on a CPU, to be measured.

python scripts/benchmark.py --config=config/small.py --random

It has an architecture and no weights, and so trains nothing; config/tiny.py does. Decoding an image
costs as many passes of the UNet as for SD1.5.
"""

from config import tiny


def get_config():
    config = tiny.get_config()
    config.pretrained.model = "assets/architectures/small"
    config.lora.rank = 4
    config.sample.batch_size = 2
    config.sample.global_batch_size = None
    config.sample.decode_batch_size = 8
    config.train.batch_size = 8
    config.train.global_batch_size = None
    return config
