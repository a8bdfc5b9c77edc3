"""Build of the Cython modules; everything else is declared in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ("zenith_utils", "postgres_ffi", "pageserver", "safekeeper", "compute_tools")


def extensions() -> list[Extension]:
    """One extension per .pyx file of the packages, named after its place in the tree."""
    found = []
    for package in PACKAGES:
        for source in sorted((ROOT / package).rglob("*.pyx")):
            path = source.relative_to(ROOT)
            found.append(
                Extension(
                    ".".join(path.with_suffix("").parts),
                    [str(path)],
                    extra_compile_args=["-O3", "-Wno-unreachable-code"],
                )
            )
    return found


setup(
    ext_modules=cythonize(
        extensions(),
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
        include_path=[str(ROOT)],
        nthreads=os.cpu_count() or 1,
    )
)
