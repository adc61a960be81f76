"""Files: written whole or not at all, locked, checked; the names in a run directory."""
