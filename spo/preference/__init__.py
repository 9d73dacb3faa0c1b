"""Training of preference models on labelled pairs of images.

Of the step-aware preference model (SPM), and of the latent reward model (LRM, in lrm.py).
spm_recipe: config -> values, objects. source, rows, batches: labelled pairs -> tensors. preparation:
tensors -> labels, pixels or noisy latents. spm_learner: these -> loss -> update. spm_trainer: the loop.
best: the best model so far.
"""
