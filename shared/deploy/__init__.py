"""Common parts of both stages' exports: graph files and model cards."""
