"""A cluster in virtual time: the fleet's own code runs on it unchanged, workers and links are
simulated."""
