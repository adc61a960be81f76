"""The roles that answer for rewards: reward server and moments server."""
