"""Scored groups between sampling and learning: prefetching, feature space, storage."""
