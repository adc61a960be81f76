"""Kernels of decoding: in plain PyTorch, in Triton, and the choice between them."""
