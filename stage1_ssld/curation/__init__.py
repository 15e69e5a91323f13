"""Selection of unlabeled images: scores, near-duplicates, the best of each class."""
