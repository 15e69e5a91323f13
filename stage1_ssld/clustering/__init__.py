"""Prototypes: classes for an encoder that has none, by k-means of its embeddings."""
