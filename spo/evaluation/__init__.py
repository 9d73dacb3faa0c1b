"""What a trained model is worth: statistics of paired scores."""
