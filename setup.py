"""Builds the wheel; everything else about the package is in pyproject.toml.

In a checkout the rooms are packages at the top: `api`, `trainer` and so on. A wheel shares site-packages with other
people's, where such names would collide, so there the rooms are inside `temper`: `temper.api`, `temper.trainer`. Their
imports are changed on the way, and nothing else: no code knows the name of the package that it is in. What is
installed with `pip install -e` stays as in the checkout.
"""

import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ("api", "cli", "load", "serving", "store", "trainer")
LEFT_OUT = ("load.rivals*",)  # servers to compare with, which need a checkout
BENCHMARK = re.compile(r"bench(_\w+)?|figures")  # modules of `load` that do, too
IMPORT = re.compile(rf"^(\s*(?:from|import) )({'|'.join(ROOMS)})(?=[. ])", re.MULTILINE)
EDITABLE = "editable_wheel" in sys.argv


class BuildPy(build_py):
    """Copies the packages, with imports that fit where they go."""

    def run(self):
        """Copy everything, and nothing that an earlier build has left."""
        if not EDITABLE:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        """Find the modules of a package."""
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if EDITABLE or package != "temper.load" or not BENCHMARK.fullmatch(each[1])]

    def build_module(self, module, module_file, package):
        """Copy a module."""
        target, copied = super().build_module(module, module_file, package)
        if not EDITABLE:
            path = Path(target)
            path.write_text(IMPORT.sub(r"\1temper.\2", path.read_text(encoding="utf-8")), encoding="utf-8")
        return target, copied


prefix = "" if EDITABLE else "temper."
rooms = find_packages(include=[f"{room}{more}" for room in ROOMS for more in ("", ".*")], exclude=LEFT_OUT)
setup(
    cmdclass={"build_py": BuildPy},
    packages=["temper", *(prefix + room for room in rooms)],
    package_dir={prefix + room: room.replace(".", "/") for room in rooms},
    package_data={
        "temper": ["py.typed"],
        f"{prefix}api": ["report/templates/*", "ui/*", "ui/vendor/*"],
        f"{prefix}trainer": ["base/*"],
    },
    entry_points={"console_scripts": [f"temper = {prefix}cli.main:main"]},
)
