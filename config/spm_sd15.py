"""The step-aware preference model of Stable Diffusion 1.5, as in SPO: 4 x A100 80 GB.

bash launch_spm.sh
"""

from config import spm_base


def get_config():
    return spm_base.get_config()
