"""Captions: read from files, encoded by T5, stored with their features."""
