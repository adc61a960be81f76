"""Judging images: scorers, features, moments, the leave-one-out FID, and the roles that serve them."""
