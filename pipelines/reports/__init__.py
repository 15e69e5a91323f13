"""Table and HTML report of a pipeline."""
