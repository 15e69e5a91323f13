"""Images and boxes of stage 2: COCO files, views and batches."""
