"""The pipeline that `ssld init` writes."""
