"""The one exception that a user's input can cause; the command line prints it as one line and exits with 2."""

from lidnet_fast.urls import without_secrets


class InputError(ValueError):
    """Something the user gave (a file, a table, a configuration value) can't be used.

    The message names the offending thing and the cause, on one line, and of URLs only what isn't secret.
    """

    def __init__(self, message: object) -> None:
        super().__init__(without_secrets(str(message)))
