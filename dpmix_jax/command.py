"""The command `dpmix`: the programs of `experiments/` by name, from any folder.

    dpmix train digits:8 --config.seed=1     trains, or goes on; digits is a config
    dpmix train photos/ --epsilon=4          proposes a config for a folder of images of
                                             one's own, and trains it
    dpmix propose photos/ --epsilon=4        the same, without training
    dpmix sweep table11:digits               many runs, and their table
    dpmix report table11:digits runs.csv to  its tables and plots again, from its CSV
    dpmix predict runs/digits-8 photos/      labels and probabilities of images, as CSV
    dpmix export runs/digits-8 my-model      what may be released, as one folder
    dpmix metrics runs/digits-8 --csv=m.csv  its metrics as CSV, or for TensorBoard
    dpmix audit digits:8                     how much do its outputs give away?
    dpmix budget digits                      what all runs on these records have spent
    dpmix calibrate --epsilon=3 --n=60000 --batch=4096 --updates=1000
    dpmix show digits                        draws the augmentation set of a test image
    dpmix prepare cifar10 --download         fetches and decodes a dataset once
    dpmix generate --out=bank ...            public synthetic images
    dpmix configs                            lists the configs that there are
    dpmix completion                         for bash: eval "$(dpmix completion)"

After these words come the flags of the program, which `dpmix train --help` lists. A
config is one of `dpmix configs`, a Python file, or the config.json of a run; what
follows a colon is its argument. With --dry_run a command says what it would do.
"""

import itertools
import pathlib
import runpy
import sys
from typing import NoReturn

from dpmix_jax.run import cli

# Programs, and the flags that the first words after the command stand for.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("run", ("config",)),
    "sweep": ("sweep", ("config",)),
    "report": ("report", ("config", "runs", "to")),
    "predict": ("predict", ("run", "images")),
    "export": ("export", ("run", "to")),
    "propose": ("propose", ("images",)),
    "metrics": ("metrics", ("run",)),
    "audit": ("audit", ("config",)),
    "budget": ("budget", ("config",)),
    "calibrate": ("calibrate", ()),
    "show": ("show", ("config",)),
    "prepare": ("prepare", ("name",)),
    "generate": ("generate", ()),
}


def main() -> NoReturn:
    """Runs `dpmix <command> [words and flags]`; it ends as the program ends."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("help", "--help", "-help", "-h"):
        print((__doc__ or "").strip())
    elif name == "configs":
        for config, title in cli.config_names().items():
            print(f"{config:<26} {title}")
    elif name == "completion":
        words = " ".join([*COMMANDS, "configs", *cli.config_names()])
        print(f'complete -o default -W "{words}" dpmix')
    elif name == "train" and rest and _is_folder(rest[0]):
        _run(*COMMANDS["propose"], [*rest, "--train"])
    elif name in COMMANDS:
        _run(*COMMANDS[name], rest)
    else:
        names = ", ".join([*COMMANDS, "configs", "completion"])
        cli.fail(f"dpmix {name} is no command: it must be one of {names}")
    sys.exit(0)


def _is_folder(word: str) -> bool:
    """Whether a folder is meant, there or not, and not the config of its name."""
    known = word.partition(":")[0] in cli.config_names()
    return word.endswith("/") or (not known and pathlib.Path(word).is_dir())


def _run(program: str, named: tuple[str, ...], argv: list[str]) -> None:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    flags = [f"--{name}={word}" for name, word in zip(named, words, strict=False)]
    flags += argv[len(flags) :]
    folder = cli.programs_folder() / "experiments"
    path = str(folder / f"{program}.py")
    sys.argv = [path, *flags]
    sys.path.insert(0, str(folder))  # as Python does for a program
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
