"""Evaluation of policies and images: what is sampled, what is kept of it, tables, comparisons."""
