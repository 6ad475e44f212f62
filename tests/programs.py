"""Runs a program of `experiments/` in this process, as its command line would."""

import contextlib
import io
import pathlib
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

from absl import app, flags, logging  # noqa: F401  their own flags are known first

from tests.conftest import ROOT


def call(
    script: str, argv: Sequence[str], *, folder: pathlib.Path = ROOT
) -> subprocess.CompletedProcess:
    """Returns status, output and errors of `python <script> <argv>`.

    Args:
      script: such as `experiments/run.py`.
      argv: its flags.
      folder: that paths are relative to, by default the root of the repository.
    """
    out, err = io.StringIO(), io.StringIO()
    path = str(ROOT / script)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", [path, *argv]),
            mock.patch.object(sys, "path", [str(ROOT / "experiments"), *sys.path]),
            mock.patch("dpmix_jax.run.performance.keep_compiled_code"),
            forgotten_flags(),
        ):
            runpy.run_path(path, run_name="__main__")
            status = 0
    except SystemExit as ended:
        status = ended.code or 0
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def forgotten_flags() -> Iterator[None]:
    """Removes the flags that a program defines, so that the next one can."""
    known = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
