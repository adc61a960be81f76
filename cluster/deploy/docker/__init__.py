"""The image for nodes of a cluster: `Dockerfile`, and what it needs to be built."""
