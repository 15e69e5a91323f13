"""The table and the HTML page of a pipeline."""
