"""The systems of the miniature: each file says which networks one has, and how they are trained."""
