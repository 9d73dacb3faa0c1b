"""Stepwise preference optimisation (GradSPO, SPO) of Stable Diffusion 1.5 and SDXL."""

__version__ = "0.1.0"
