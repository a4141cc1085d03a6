"""What a user's input can cause: an exception, which the command line prints as one line (status 2), or a warning."""

from lidnet_fast.urls import without_secrets


class InputError(ValueError):
    """Something the user gave (a file, a table, a configuration value) can't be used.

    The message names the offending thing and the cause, on one line, and of URLs only what isn't secret.
    """

    def __init__(self, message: object) -> None:
        super().__init__(without_secrets(str(message)))


class InputWarning(UserWarning):
    """An argument works but is hardly what was meant, such as boxes outside the image.

    By default Python shows each kind once for each line that causes it, whatever numbers it names. To switch them off:
    `warnings.filterwarnings("ignore", category=lidnet_fast.InputWarning)`.
    """
