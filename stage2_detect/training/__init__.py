"""A detector in training: initial weights, memory trial, validation loss."""
