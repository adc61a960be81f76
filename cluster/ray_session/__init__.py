"""Starting or joining Ray: addresses, token, object store, calls with timeouts."""
