"""Proposes a config for a folder of one's own images, with a folder for each class.

    python experiments/propose.py --images=photos --epsilon=4

prints the config, writes it into photos.py, and says what to expect. With --train it
is trained at once, as `dpmix train photos --epsilon=4` does.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import pathlib
import sys

from absl import flags

from dpmix_jax.errors import UserError, require
from dpmix_jax.files import write_atomically
from dpmix_jax.progress import say
from dpmix_jax.run import cli, proposal

_IMAGES = flags.DEFINE_string("images", None, "The folder.", required=True)
_EPSILON = flags.DEFINE_float("epsilon", None, "The budget.", required=True)
_DELTA = flags.DEFINE_float("delta", None, "Of the budget; by default below 1 / 10 N.")
_OUT = flags.DEFINE_string("out", None, "Config to write; by default <folder>.py.")
_TRAIN = flags.DEFINE_bool("train", False, "Whether to train it at once.")
cli.define_dry_run()


def main() -> None:
    folder = pathlib.Path(_IMAGES.value)
    if pathlib.Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"--images is {folder}: it must not hold the present folder, into which the"
            " config and the run are written"
        )
    out = pathlib.Path(_OUT.value or f"{folder.resolve().name}.py")
    fits = out.suffix == ".py" and ":" not in str(out)
    require(fits, "--out", str(out), "a name that ends in .py, without a colon")
    found = proposal.look(folder)
    text = proposal.propose(folder, found, epsilon=_EPSILON.value, delta=_DELTA.value)
    if out.exists() and out.read_text() != text:
        raise UserError(
            f"--out is {out}: it is there, and not what is proposed; train it with"
            f" --config={out}, or give another name"
        )
    print(text)
    if cli.would(f"write this into {out}" + ", and train it" * _TRAIN.value):
        return
    write_atomically(out, text)
    say(
        f"{out} is a config: change what you know better, and train it again with"
        f" --config={out} and another --workdir"
    )
    if _TRAIN.value:
        run = pathlib.Path(__file__).with_name("run.py")
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(run), f"--config={out}"])


if __name__ == "__main__":
    cli.start(main)
