"""Losses between a student detector and its teacher: a frozen, better detector, or the moving average of the student."""
