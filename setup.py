"""The package is described in pyproject.toml.

A wheel also holds `configs` and `experiments`, for the command `dpmix`.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPrograms(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # where both are beside the package
            return
        programs = pathlib.Path(self.build_lib) / "dpmix_jax" / "programs"
        shutil.rmtree(programs, ignore_errors=True)  # of an earlier build
        for name in ("configs", "experiments"):
            shutil.copytree(
                name,
                programs / name,
                ignore=shutil.ignore_patterns("__pycache__"),
            )


setup(cmdclass={"build_py": BuildWithPrograms})
