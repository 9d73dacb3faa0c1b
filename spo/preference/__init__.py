"""Training of the step-aware preference model (SPM) on labelled pairs of images.

rows -> batches -> (labels) -> noised predictions of the base model -> SPM -> loss -> update
"""
