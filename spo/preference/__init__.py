"""Training of the step-aware preference model (SPM) on labelled pairs of images.

spm_recipe: config -> values, objects. source, rows, batches: labelled pairs -> tensors. preparation:
tensors -> labels, predictions -> pixels. spm_learner: pixels -> loss -> update. spm_trainer: the loop.
"""
