"""Kept samples: what they are of, their parts on disk, the real images beside them, and images from
their tokens."""
