"""A teacher detector and its losses on a student."""
