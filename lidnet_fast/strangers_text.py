"""Text from strangers' files, such as UIDs and names of files, as it may be shown."""


def printable(text: str) -> str:
    r"""Text in which control characters are escaped: on a terminal they could move the cursor and hide what was said.

    Line ends stay; every other character that isn't printable becomes its escape, such as ``\x1b``.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def csv_cell(value: object) -> str:
    """A cell that a spreadsheet shows and doesn't compute: one that begins like a formula gets an apostrophe."""
    text = printable(str(value)).replace("\n", " ")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
