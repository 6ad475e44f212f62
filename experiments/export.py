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
cli.define_dry_run()


def main() -> None:
    run, folder = pathlib.Path(_RUN.value), pathlib.Path(_TO.value)
    export.check(run, folder)
    files = ", ".join(export.RELEASED)
    if cli.would(f"copy {files} from {run} to {folder}, and write README.md"):
        return
    export.export(run, folder)
    print(f"exported to {folder}")


if __name__ == "__main__":
    cli.start(main)
