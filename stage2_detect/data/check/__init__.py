"""Checks of a COCO file and its images before training."""
