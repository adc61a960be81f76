"""Metrics, timeline, guards, console and galleries of a run."""
