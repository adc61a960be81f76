"""The run directory: its configuration file and its records."""
