"""A cluster planned: an iteration from its pieces, bytes over links, the best split of GPUs."""
