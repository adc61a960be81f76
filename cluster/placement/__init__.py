"""Where workers fit: nodes, their labels, and the search for an arrangement. Pure."""
