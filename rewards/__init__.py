"""Judging images: scorers, features, moments, leave-one-out FID, and the roles that serve them."""
