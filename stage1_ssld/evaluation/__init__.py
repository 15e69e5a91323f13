"""Metrics of classifiers, nearest neighbors, curves."""
