"""The one exception of the package for mistakes that a user can mend."""


class UserError(ValueError):
    """A bad value, file or key: one line naming it and what is allowed instead.

    Command-line programs print the message and exit with a non-zero status; library
    users catch it as the `ValueError` it is.
    """


def require(valid: bool, key: str, value: object, allowed: str) -> None:
    """Raises `UserError` that says what is allowed, if a value is not valid."""
    if not valid:
        raise UserError(f"{key} is {value!r}: it must be {allowed}")
