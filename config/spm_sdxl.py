"""The step-aware preference model of SDXL 1.0, as in SPO: 4 x A100 80 GB.

bash launch_spm.sh --config=config/spm_sdxl.py
"""

from config import spm_base


def get_config():
    config = spm_base.get_config()
    config.family = "sdxl"
    config.max_train_steps = 7000
    config.pretrained.model = "stabilityai/stable-diffusion-xl-base-1.0"
    config.pretrained.vae = "madebyollin/sdxl-vae-fp16-fix"
    config.data.image_size = 1024
    config.labels.source = "pickscore"
    # 8 images of 1024 pixels have 2^31 activations in the VAE, too many for some GPU kernels.
    config.train.predict_batch_size = 4
    config.train.learning_rate = 1e-6
    return config
