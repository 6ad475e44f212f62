"""The one exception of the package for mistakes that a user can mend."""


class UserError(ValueError):
    """A bad value, file or key: one line naming it and what is allowed instead.

    Command-line programs print the message and exit with a non-zero status; library
    users catch it as the `ValueError` it is.
    """
