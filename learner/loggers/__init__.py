"""Loggers: the tools that show curves and images of a run (`output.loggers`)."""
