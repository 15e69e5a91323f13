"""A detector in training: its initial weights and their scale, its average, its learning rate, its validation loss, and checks on the way."""
