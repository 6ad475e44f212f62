"""What the programs in `experiments/` share: config flags, and mistakes as one line."""

import ast
import functools
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from dpmix_jax.errors import UserError
from dpmix_jax.run import config


class _ConfigParser(ConfigFileFlagParser):
    """Loads Python config files, and the `config.json` of a run, which is one too."""

    def parse(self, path: str) -> ConfigDict:
        path = find_config(path)
        if not (path.endswith(".json") and pathlib.Path(path).is_file()):
            return super().parse(path)
        values = json.loads(pathlib.Path(path).read_text(), object_hook=_without_none)
        return ConfigDict({"public": {}, **values})


def _without_none(group: dict[str, Any]) -> dict[str, Any]:
    """Drops settings at None, their default, which flags could not set otherwise."""
    return {key: value for key, value in group.items() if value is not None}


def programs_folder() -> pathlib.Path:
    """Returns the folder of `experiments` and `configs`: the wheel's, or a checkout."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "programs"
    return inside if inside.is_dir() else package.parent


def config_names() -> dict[str, str]:
    """Returns the first line of each config that comes with the package, by name."""
    paths = sorted((programs_folder() / "configs").glob("[!_]*.py"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text())) for path in paths}
    return {name: (doc or "").partition("\n")[0] for name, doc in docs.items()}


def find_config(text: str) -> str:
    """Returns `<file>[:<argument>]` for a file, or for the name of a known config.

    Args:
      text: such as `my_config.py:8`; `digits:8` and `configs/digits.py:8` are those of
        the package where there is no such file.
    """
    name, colon, argument = _split(text)
    if pathlib.Path(name).is_file():
        return text
    stem = name.removeprefix("configs/").removesuffix(".py")
    if stem not in config_names():
        return text
    return f"{programs_folder() / 'configs' / stem}.py{colon}{argument}"


def _split(text: str) -> tuple[str, str, str]:
    """Returns file, colon and argument; a file may have a colon in its path."""
    return (text, "", "") if pathlib.Path(text).is_file() else text.partition(":")


def read_config(text: str) -> ConfigDict:
    """Returns what a config says, given as `--config` takes it.

    Raises:
      UserError: if there is no such config, or it is that of a sweep.
    """
    path, *_ = _split(find_config(text))
    _check_file(path)
    found = _ConfigParser("config", lock_config=False).parse(text)
    if "optimizer" not in found:
        raise UserError(f"config is {text}: it must be that of one run")
    return found


def define_config(
    flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
    """Defines `--config=<file>` or `--config=<file>:<argument of get_config>`.

    Unknown keys pass here; `config.from_config_dict` refuses them with those of files.

    Args:
      flag_values: receives the flag and those of the config's keys.
      argv: the command line with the program's name, if it is not this program's own.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Path of a config file; what follows a colon is its argument.",
        flag_values=flag_values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=None if argv is None else list(argv),
    )
    flag_values["config"].parser = _ConfigParser("config", lock_config=False)
    return holder


def define_dry_run() -> None:
    """Defines `--dry_run`, which `would` asks for."""
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Tells what the program would do, and does not do it.",
        module_name=sys.argv[0],
    )


def would(do: str) -> bool:
    """Returns whether `--dry_run` is given; if so, it prints what the program would do.

    Args:
      do: what follows "would ", when all that is cheap to check was found to be right.
    """
    if flags.FLAGS.dry_run:
        print(f"would {do}")
    return flags.FLAGS.dry_run


def config_file(
    flag_values: flags.FlagValues = flags.FLAGS,
) -> tuple[pathlib.Path, str]:
    """Returns the file that `--config` names, and its argument, or "" for none.

    Raises:
      UserError: if there is no such file.
    """
    if flag_values["config"].value is None:
        raise UserError(
            "--config is missing: give a file, or a name of `dpmix configs`"
        )
    name = find_config(config_flags.get_config_filename(flag_values["config"]))
    path, _, argument = _split(name)
    _check_file(path)
    return pathlib.Path(path), argument


def _check_file(path: str) -> None:
    if not pathlib.Path(path).is_file():
        raise UserError(
            f"--config is {path}: there is no such file, nor a config of that name"
        )


def default_workdir(path: pathlib.Path, argument: str) -> pathlib.Path:
    """Returns `runs/<config file>[-<argument>]`, of paths the last part."""
    name = pathlib.Path(argument).name
    return pathlib.Path("runs") / "-".join(filter(None, (path.stem, name)))


def load_experiment(argv: Sequence[str]) -> config.ExperimentConfig:
    """Reads what `experiments/run.py` would run, given these flags.

    Raises:
      UserError: for what `experiments/run.py` refuses before it reads data.
    """
    values, argv = flags.FlagValues(), ["run.py", *argv]
    holder = define_config(values, argv)
    try:
        config.check_flags(argv)
        values(argv)
        config_file(values)
        return config.from_config_dict(holder.value)
    except Exception as error:
        raise UserError(explain(error)) from None


def explain(error: Exception) -> str:
    """Returns one line for the user about what parsing the command line has raised."""
    text = str(error).strip()
    if "Traceback" in text:  # config_flags puts what a file raised into the message
        own = f"{UserError.__module__}.{UserError.__qualname__}: "
        text = f"--config cannot be loaded: {text.splitlines()[-1].removeprefix(own)}"
    elif not isinstance(error, UserError | flags.Error):
        text = f"--config cannot be loaded: {type(error).__name__}: {text}"
    return " ".join(text.split())


def parse(
    argv: list[str], *, check: Callable[[list[str]], None] = lambda argv: None
) -> list[str]:
    """Parses the flags of a program; a mistake is one line and exit status 2.

    Args:
      argv: the command line.
      check: looks at it first, and raises `UserError` for a mistake.
    """
    if {"--help", "-help", "-h"} & set(argv):
        print(help_text())
        sys.exit(0)
    # Config files import `configs._base`: `configs` lies beside the folder of programs.
    sys.path.insert(0, str(pathlib.Path(argv[0]).resolve().parents[1]))
    try:
        check(argv)
        return flags.FLAGS(argv)
    except Exception as error:  # also whatever the user's config file raises
        fail(explain(error))


def start(
    main: Callable[[], int | None],
    *,
    check: Callable[[list[str]], None] = lambda argv: None,
) -> NoReturn:
    """Runs a program; a user's mistake is one line and exit status 2.

    Args:
      main: returns the exit status, or None for 0.
      check: see `parse`.
    """

    def guarded(argv: list[str]) -> NoReturn:
        logging.set_verbosity(logging.WARNING)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if argv[1:]:
                raise UserError(f"{argv[1]} is not a flag: they begin with --")
            status = main()
        except (UserError, OSError) as error:
            fail(error)
        except KeyboardInterrupt:
            status = 130
        sys.exit(status)

    app.run(guarded, flags_parser=functools.partial(parse, check=check))


def help_text() -> str:
    """Returns what a program is for, its flags, and the configs there are."""
    program = sys.modules["__main__"]
    lines = [(program.__doc__ or "").strip(), flags.FLAGS.main_module_help()]
    if "config" in flags.FLAGS:
        lines += [
            "--config: a config file, or the name of one of those below; what follows a"
            " colon is its argument.",
            "--config.<group>.<name>: a value of the config.\n\nConfigs:",
        ]
        lines += [f"  {name:<22} {title}" for name, title in config_names().items()]
    return "\n".join(lines)


def fail(error: Exception | str) -> NoReturn:
    """Ends the program by one line for the user and exit status 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
