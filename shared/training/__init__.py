"""Parts of a training run, of either stage, around its loop."""
