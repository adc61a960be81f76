"""Decoding with a KV cache: the distribution of a token, the steps, the loop."""
