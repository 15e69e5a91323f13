"""Readers of YOLO, Pascal VOC and Hugging Face data sets."""
