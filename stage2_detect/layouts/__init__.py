"""Where data sets of YOLO and COCO keep their files."""
