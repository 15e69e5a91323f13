"""Settings and template of the pipeline that `ssld init` writes."""
