"""Checks of `ssld doctor`: machine, settings, data."""
