"""Triton Inference Server: write a model repository, and serve it on this machine."""
