"""Exports what may be released of a finished run, and nothing else, as one folder.

    python experiments/export.py --run=runs/digits --to=digits-model

The folder holds weights, model card, privacy statement and preprocessing, and loads
back by `dpmix_jax.load`.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.run import cli, export

_RUN = flags.DEFINE_string("run", None, "Workdir of a finished run.", required=True)
_TO = flags.DEFINE_string("to", None, "Folder to make.", required=True)


def main() -> None:
    export.export(pathlib.Path(_RUN.value), pathlib.Path(_TO.value))
    print(f"exported to {_TO.value}")


if __name__ == "__main__":
    cli.start(main)
