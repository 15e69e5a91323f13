"""Metrics of classifiers, nearest neighbours, curves."""
