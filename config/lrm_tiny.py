"""The latent reward model of the embedded tiny Stable Diffusion, on a CPU.

bash launch_spm.sh --cpu --config=config/lrm_tiny.py
"""

from config import lrm_sd15


def get_config():
    config = lrm_sd15.get_config()
    config.mixed_precision = "no"
    config.max_train_steps = 400
    config.save_steps = 200
    config.eval_steps = 50
    config.pretrained.model = "assets/tiny/sd15"
    config.preference.text_projection = "assets/tiny/clip"
    config.preference.guidance_scale = 2.0  # as config/tiny.py
    config.data.source = "assets/tiny/pickapic"
    config.data.image_size = 32
    config.data.num_workers = 0
    config.data.max_validation = 400
    config.labels.backbone = "assets/tiny/clip"
    config.labels.processor = "assets/tiny/clip"
    config.train.batch_size = 32
    config.train.global_batch_size = 32
    config.train.predict_batch_size = 64
    config.train.learning_rate = 1e-4
    config.train.warmup_steps = 50
    config.tracker.name = "none"
    return config
