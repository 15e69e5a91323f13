"""COCO AP, analysis, drawings and test-time augmentation."""
