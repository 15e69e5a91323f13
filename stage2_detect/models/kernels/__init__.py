"""Faster forms of plain operations, equal to them."""
