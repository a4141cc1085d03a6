"""Text from strangers' files, such as UIDs and names of files, as it may be shown."""

from lidnet_fast.urls import without_secrets


def printable(text: str) -> str:
    r"""Text as a terminal may show it: without control characters, which could hide what was said, and URLs' secrets.

    Line ends stay; every other character that isn't printable becomes its escape, such as ``\x1b``.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in without_secrets(text)
    )


def csv_cell(value: object) -> str:
    """A cell that a spreadsheet shows and doesn't compute: one that begins like a formula gets an apostrophe."""
    text = printable(str(value)).replace("\n", " ")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
