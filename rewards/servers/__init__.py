"""The roles of rewards: reward server and moments server."""
