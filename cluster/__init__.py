"""The wire: messages between processes, packed weights, and the fleet of roles that Ray runs."""
