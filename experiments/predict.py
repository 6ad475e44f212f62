"""Labels images by the model of a finished run, or of its export.

    python experiments/predict.py --run=runs/digits --images=photos --out=labels.csv

The CSV has a line for each image: its file, its label, a probability for each class.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.run import cli, export, predict

_RUN = flags.DEFINE_string("run", None, "Workdir or export.", required=True)
_IMAGES = flags.DEFINE_string("images", None, "Image file or folder.", required=True)
_OUT = flags.DEFINE_string("out", "predictions.csv", "CSV file to write.")
_ENCODER = flags.DEFINE_string("encoder", None, "The run's finetune.encoder, if any.")
_WEIGHTS = flags.DEFINE_string("weights", None, "The run's finetune.weights, if any.")
cli.define_dry_run()


def main() -> None:
    run, images, out = (pathlib.Path(flag.value) for flag in (_RUN, _IMAGES, _OUT))
    about, found = export.read_about(run), predict.image_files(images)
    if cli.would(
        f"label {len(found):,} images by the {about['model']['name']} of {run}, as one"
        f" of {len(about['class_names'])} classes, and write {out}"
    ):
        return
    number = predict.predict(
        *(run, images, out),
        encoder=_ENCODER.value,
        weights=_WEIGHTS.value,
    )
    print(f"{number:,} images: {_OUT.value}")


if __name__ == "__main__":
    cli.start(main)
