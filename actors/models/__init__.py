"""Policies and tokenizers, and strict loading of their checkpoints."""
