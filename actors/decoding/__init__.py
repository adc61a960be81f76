"""Decoding with a KV cache: the steps, the loop."""
