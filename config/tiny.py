"""GradSPO on the embedded tiny world: a few minutes on a CPU.

bash launch_tiny.sh
"""

from ml_collections import ConfigDict

from config import base


def get_config():
    config = base.get_config()
    config.mixed_precision = "no"
    config.num_epochs = 1
    config.pretrained.model = "assets/tiny/sd15"
    config.preference.checkpoint = "assets/tiny/spm.safetensors"
    config.preference.backbone = "assets/tiny/clip"
    config.preference.processor = "assets/tiny/clip"
    config.prompts.source = "assets/tiny/prompts/train.txt"
    config.prompts.num = 0
    config.lora.rank = 8
    # At 5 this base model paints every image in full colour, and leaves little to prefer.
    config.sample.guidance_scale = 2.0
    config.eval.guidance_scale = 2.0
    config.sample.threshold = 0.1  # candidates differ less here than at 512 pixels
    # The global sizes stay whatever the number of processes.
    config.sample.batch_size = 8
    config.sample.global_batch_size = 8
    config.sample.decode_batch_size = 32
    config.train.batch_size = 16
    config.train.global_batch_size = 16
    config.train.learning_rate = 5e-4
    config.eval.prompts = "assets/tiny/prompts/held_out.txt"
    config.eval.num_judged = 32
    config.eval.batch_size = 16
    # The world's PickScore is what the preference model started from, and the only other judge here.
    config.eval.judges = ("pickscore",)
    clip = {"backbone": "assets/tiny/clip", "processor": "assets/tiny/clip"}
    config.eval.judge_options = ConfigDict({"pickscore": clip}, allow_dotted_keys=True)
    config.tracker.name = "none"
    return config
