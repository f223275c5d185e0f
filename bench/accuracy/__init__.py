"""Accuracy of pruned classifiers, and what of the recipe makes it."""
