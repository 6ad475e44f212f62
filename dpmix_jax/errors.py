"""The one exception of the package for mistakes that a user can mend."""

import contextlib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A bad value, file or key: one line naming it and what is allowed instead.

    Command-line programs print the message and exit with a non-zero status; library
    users catch it as the `ValueError` it is.
    """


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises `UserError`, "<key> is <value>: it must be <allowed>", unless `ok`."""
    if not ok:
        raise UserError(f"{key} is {value!r}: it must be {allowed}")


def require_one_of(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raises `UserError` for a value that is none of those allowed."""
    names = list(allowed)
    require(value in names, key, value, f"one of {', '.join(names)}")


@contextlib.contextmanager
def needing(extra: str, who: str) -> Iterator[None]:
    """Turns the failure of an import into a line that names the extra to install.

    Args:
      extra: of this package, which has what is imported.
      who: the beginning of the line, such as `--launcher needs`.
    """
    try:
        yield
    except ImportError as error:
        install = f'pip install "dpmix_jax[{extra}]"'
        raise UserError(f"{who} the extra, {install} ({error})") from None
