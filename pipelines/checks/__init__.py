"""What `ssld doctor` looks at: machine, settings, image folders."""
