"""Training of the step-aware preference model (SPM) on labelled pairs of images.

spm_recipe   config -> the values of a training, checked, and the objects that they make
source       where labelled pairs come from
rows         which rows are used, and which process takes which
batches      rows -> tensors
preparation  tensors -> labels, predictions of the base model -> pixels for the SPM
spm_learner  pixels -> scores -> loss -> gradients -> update
spm_metrics, spm_trainer
"""
