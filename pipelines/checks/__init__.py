"""What `ssld doctor` looks at: machine, settings, data."""
