"""Training of the step-aware preference model (SPM) on labelled pairs of images.

spm_recipe: config -> checked values and objects. source, rows, batches: labelled pairs -> tensors.
preparation: tensors -> labels, predictions of the base model -> pixels. spm_learner: pixels -> scores
-> loss -> update. spm_metrics, spm_trainer: the loop.
"""
