"""Sampling: schedule, guidance, noise, and the samplers in two forms."""
