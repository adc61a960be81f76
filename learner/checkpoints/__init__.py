"""Checkpoints: content, schedule, copies at a URL, and how a run resumes."""
