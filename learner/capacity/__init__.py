"""Memory, disk and object store that a run needs, computed from its configuration."""
