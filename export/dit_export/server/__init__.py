"""Triton Inference Server: what a model repository and the machine that serves it are made of."""
