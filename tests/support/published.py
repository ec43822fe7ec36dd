"""Numbers that Peebles & Xie 2022 print."""

from __future__ import annotations

# The appendix's table of all models at 256 px: "Flops (G)", which are multiply-adds, and
# "Params (M)", which leave out the fixed position table.
GMACS_AND_MILLIONS = {
    "DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33),
    "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130), "DiT-B/2": (23.01, 130),
    "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
    "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675), "DiT-XL/2": (118.64, 675),
}  # fmt: skip
