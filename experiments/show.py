"""Draws the augmentation set of a test image, as the config would make it.

    python experiments/show.py --config=configs/digits.py --out=set.png

Training images, which are private, are not shown.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.files import replacing
from dpmix_jax.run import build, cli, config, plots, start

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", "set.png", "PNG file to write.")
cli.define_dry_run()


def main() -> None:
    cli.config_file()
    shown = config.from_config_dict(_CONFIG.value)
    method = shown.method
    if cli.would(
        f"read {shown.data.name}, make a set of {method.set_size} images"
        f" ({method.name}) of its first test record, and draw it into {_OUT.value}"
    ):
        return
    dataset, public = start.read(shown)
    shown.augmentation.check_images(dataset.test.image_shape)
    pool = build.make_pool(shown, public if shown.draws_public else None)
    images = build.example_set(shown, dataset.test, pool)
    figure = plots.plot_sheet(images, method.num_views, method.num_public)
    with replacing(pathlib.Path(_OUT.value)) as file:
        figure.savefig(file, format="png", dpi=150)
    print(f"{len(images)} images: {_OUT.value}")


if __name__ == "__main__":
    cli.start(main, check=config.check_flags)
