"""Builds the compiled CPU kernels where there is a C++17 compiler; everything else is declarative.

The library needs neither torch's headers nor Python's, so a plain isolated build makes it, and one
wheel serves every Python 3 and every torch. Without a compiler wina installs all the same and
computes with its reference kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/wina/kernels/cpu")
LIBRARY = "wina.kernels.cpu.libwina_cpu"
# No -march: each instruction set has its own file and is chosen when the library is loaded.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]


class BuildLibrary(build_ext):
    """Build a plain shared library, not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        del ext  # a Python module would export its init function
        return []


class PlatformWheel(bdist_wheel):
    """Tag the wheel for this platform and any Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    LIBRARY,
    sources=sorted(str(path) for path in FOLDER.glob("*.cpp")),
    depends=sorted(str(path) for path in FOLDER.glob("*.h")),
    extra_compile_args=FLAGS,
    language="c++",
    optional=True,
)
setup(
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
