"""How good images are: FID and FD-Lite0 of sets, and what a backend or precision costs."""

# Here, so that the help of a command can list them without importing torch.
NETWORKS = ("inception", "lite0")
"""Names of the feature networks."""
