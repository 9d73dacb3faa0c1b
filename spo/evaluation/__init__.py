"""What a trained model is worth: scorers of finished images, statistics of paired scores."""
