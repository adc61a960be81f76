"""Ray itself: starting or joining a cluster, its token and object store, bounded calls."""
