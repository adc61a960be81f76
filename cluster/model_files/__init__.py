"""Checkpoints of other programs, read without unpickling, and files of tensors."""
