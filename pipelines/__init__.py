"""The runner that drives both stages, its report and the `ssld` command."""
