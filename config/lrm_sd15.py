"""The latent reward model of Stable Diffusion 1.5, as in LPO: 8 GPUs.

bash launch_spm.sh --config=config/lrm_sd15.py

LPO trains on pairs that other scorers agree on. All pairs are used here, because data.filter needs a
file of those scores, which scripts/filter_pairs.py makes.
"""

from config import spm_base


def get_config():
    config = spm_base.get_config()
    config.max_train_steps = 4000
    config.eval_steps = 100
    config.keep_best = True
    config.preference.model = "latent_reward"
    config.data.resize = "stretch"
    config.train.batch_size = 16
    config.train.global_batch_size = 128
    config.train.num_timesteps = 20
    config.train.learning_rate = 1e-5
    config.train.warmup = "logarithmic"
    return config
