"""Measuring trained models: images, scores, paired statistics, reports to look at."""
