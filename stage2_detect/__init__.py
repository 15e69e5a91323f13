"""Stage 2: detectors fine-tuned from a backbone file, scored by COCO AP."""
