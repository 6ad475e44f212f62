"""Runs a program once for each of many command lines, its imports paid once.

Each run is a process of its own, forked from one that has imported what programs
import, before JAX has a backend.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tests.conftest import ROOT

FORKS = """
import json, os, pathlib, runpy, sys, traceback, warnings
from dpmix_jax import dry_run, experiment, sweep
script, folder, commands = json.load(sys.stdin)
for number, argv in enumerate(commands):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which JAX does not have yet
        child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pathlib.Path(folder, f"{number}.status").write_text(str(status))
        continue
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{number}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
    sys.argv, status = [script, *argv], 0
    sys.path[0] = os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


def run_each(
    script: str, commands: Sequence[Sequence[str]]
) -> list[subprocess.CompletedProcess]:
    """Returns status, output and errors of `python <script> <command>`, in order."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", FORKS],
            input=json.dumps([script, folder, list(map(list, commands))]),
            text=True,
            cwd=ROOT,
            check=True,
        )

        def text(number, name):
            return pathlib.Path(folder, f"{number}.{name}").read_text()

        return [
            subprocess.CompletedProcess(
                command, int(text(n, "status")), text(n, "out"), text(n, "err")
            )
            for n, command in enumerate(commands)
        ]
