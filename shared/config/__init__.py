"""Settings of a command: strict YAML files, flags on top, and `--help`."""
