"""Detectors of other projects under the names of this one."""
