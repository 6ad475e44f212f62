"""Fetches and decodes a dataset once; writes it as a prepared TensorFlow Dataset too.

    python experiments/prepare.py --name=caltech256 --image_size=224 --download \
        [--tfds_dir=out]

Without --download the official files must be there, or at --path. Runs with the same
`data` settings then start from the decoded images. With --tfds_dir this program also
writes an array_record folder (PNG, without TensorFlow), which
`--config.data.name=tfds:caltech256 --config.data.path=out` reads.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import re
import time

from absl import flags

from dpmix_jax import data
from dpmix_jax.data import datasets, hf, tfds
from dpmix_jax.errors import UserError
from dpmix_jax.run import cli

_NAME = flags.DEFINE_string("name", None, "As data.name of a config.")
_PATH = flags.DEFINE_string("path", None, "As data.path of a config.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "As data.image_size of a config.")
_DOWNLOAD = flags.DEFINE_bool("download", False, "As data.download of a config.")
_TFDS_DIR = flags.DEFINE_string(
    "tfds_dir", None, "Where to write the prepared dataset."
)
cli.define_dry_run()


def main() -> None:
    if _NAME.value is None:
        raise UserError("--name is missing: give the name of a dataset")
    started = time.monotonic()
    config = data.DataConfig(
        name=_NAME.value,
        path=_PATH.value,
        image_size=_IMAGE_SIZE.value,
        download=_DOWNLOAD.value,
    )
    if cli.would(
        f"{get(_NAME.value)}, and decode it unless that was done"
        + f", and write it into {_TFDS_DIR.value}" * bool(_TFDS_DIR.value)
    ):
        return
    dataset = data.load(config)
    public = datasets.public_source(_NAME.value) is not None
    for split, records in (("train", dataset.train), ("test", dataset.test)):
        print(
            f"{_NAME.value} {split}: {len(records):,} images of"
            f" {records.images.shape[1:]}, {records.num_classes} classes"
            # Of private records, who knows all but one could tell that one by it.
            + (f", SHA-256 {records.digest()}" if public else "")
        )
    print(f"{time.monotonic() - started:.1f} s")
    if _TFDS_DIR.value is not None:
        # The whole name: a `mnist` of somebody else is not MNIST.
        name = tfds.builder_of(_NAME.value) or re.sub(r"\W", "_", _NAME.value)
        folder = tfds.write(name, dataset.train, dataset.test, _TFDS_DIR.value)
        print(f"{folder}: read it by data.name tfds:{name}")


def get(name: str) -> str:
    """Says where the files of the dataset come from.

    Raises:
      UserError: if there are none, and none may be fetched.
    """
    try:
        place = datasets.location(name, _PATH.value)
    except UserError:
        fetched = datasets.public_source(name) or hf.repository_of(name)
        refused = tfds.builder_of(name) or _PATH.value is not None
        if refused or not (_DOWNLOAD.value and fetched):
            raise
        return f"fetch {name}"
    return f"read {name}" + f" from {place}" * bool(place)


if __name__ == "__main__":
    cli.start(main)
