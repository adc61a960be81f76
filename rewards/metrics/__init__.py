"""Metrics of a set of images, given features and scores: quality, diversity, intervals."""
