"""Triton kernels of pyops: one module per stem; a module never imports pyops."""
