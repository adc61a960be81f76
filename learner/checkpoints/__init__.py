"""Checkpoints: what they hold, when they are written, where copies lie, how a run resumes."""
