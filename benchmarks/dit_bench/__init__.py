"""Measurements of DiT Engine: arithmetic cost, Fréchet distances, quality of a model's images."""
