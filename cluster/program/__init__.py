"""A command as a program: its start, signals, console, log messages, help and exit status."""
