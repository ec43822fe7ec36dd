"""Sampling: diffusion, schedule, guidance, noise and the samplers.

Each sampler is written here twice: as a function of torch operations that reads like its paper and
defines what is correct (`samplers`), and as coefficients of one affine update that a backend can
fuse into a single operator and that a server evaluates without torch (`coefficients`).
"""
