"""What a training run of either stage needs around its loop."""
