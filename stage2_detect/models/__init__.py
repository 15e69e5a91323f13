"""Detector modules; they see neither configuration nor data."""
