"""What Peebles & Xie 2022 (arXiv 2212.09748) print of their twelve models.

The appendix's table of all models: "Flops (G)" at 256 px, which are multiply-adds, and "Params
(M)", which leave out the fixed position table. Section 5.1 gives DiT-XL/2 at 512 px.
"""

from __future__ import annotations

SOURCE = "Peebles & Xie 2022, arXiv 2212.09748, appendix, table of all models; 512 px: section 5.1"

GFLOPS_256 = {
    "S/8": 0.36, "S/4": 1.41, "S/2": 6.06,
    "B/8": 1.42, "B/4": 5.56, "B/2": 23.01,
    "L/8": 5.01, "L/4": 19.70, "L/2": 80.71,
    "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64,
}  # fmt: skip
GFLOPS_512 = {"XL/2": 524.60}
MILLION_PARAMETERS = {
    "S/8": 33, "S/4": 33, "S/2": 33,
    "B/8": 131, "B/4": 130, "B/2": 130,
    "L/8": 459, "L/4": 458, "L/2": 458,
    "XL/8": 676, "XL/4": 675, "XL/2": 675,
}  # fmt: skip
