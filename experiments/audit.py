"""Audits the run that a config describes: how much do its outputs give away?

    python experiments/audit.py --config=configs/digits.py
    python experiments/audit.py --config=configs/digits.py --kind=mislabelled \
        --canaries=500 --repeats=3

Canaries are trained on, half of them left out at random; who sees what comes out
guesses which, and epsilon is bounded from below by how often the guesses are right. A
bound above the claim shows a fault, and the exit status is then 1. `audit.json`,
`audit.md` and `audit.png` are written into the workdir.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while JAX is imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import pathlib

from absl import flags

from dpmix_jax.run import audit, cli, config

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to write; by default runs/audit-<config file>."
)
_KIND = flags.DEFINE_enum(
    "kind",
    "gradient",
    audit.CANARIES,
    "gradient: the longest gradients there can be, without training; mislabelled:"
    " training records with a wrong label; crafted: random pixels.",
)
_CANARIES = flags.DEFINE_integer("canaries", 1000, "How many.", 8)
_REPEATS = flags.DEFINE_integer("repeats", 1, "Audits, each with other coins.", 1)
_CONFIDENCE = flags.DEFINE_float("confidence", 0.95, "Of each bound.", 0.5, 1.0)
cli.define_dry_run()


def main() -> int:
    path, argument = cli.config_file()
    default = cli.default_workdir(path.with_stem(f"audit-{path.stem}"), argument)
    audited = config.from_config_dict(_CONFIG.value)
    folder = pathlib.Path(_WORKDIR.value or default)
    audit.check(audited, _KIND.value)
    trained = "" if _KIND.value == "gradient" else f" of {audited.method.name}"
    if cli.would(
        f"audit {_REPEATS.value} time(s) {audited.privacy.num_updates:,}"
        f" updates{trained} at epsilon {audited.privacy.epsilon:g}, with"
        f" {_CANARIES.value:,} {_KIND.value} canaries, and write what is found into"
        f" {folder}"
    ):
        return 0
    within = audit.run(
        audited,
        folder,
        kind=_KIND.value,
        num_canaries=_CANARIES.value,
        repeats=_REPEATS.value,
        confidence=_CONFIDENCE.value,
    )
    return 0 if within else 1


if __name__ == "__main__":
    cli.start(main, check=config.check_flags)
