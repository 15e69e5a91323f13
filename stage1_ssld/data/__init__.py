"""Images of stage 1: sources, shards, streams, views and batches."""
