"""Training of preference models on labelled pairs of images: the SPM, and the LRM (lrm.py).

pair_recipe: config -> values, objects. source, rows, batches: labelled pairs -> tensors. preparation:
tensors -> labels, pixels or noisy latents. pair_learner: these -> loss -> update. best: the best model
so far. pair_trainer: the loop. pair_scores, filter: which pairs other judges agree on.
"""
