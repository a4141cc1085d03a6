"""Results as a table on the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lidnet_fast.strangers_text import printable


def print_table(columns: Mapping[str, str], rows: Mapping[str, Mapping[str, str]], title: str) -> None:
    """Print results as a table.

    Args:
        columns: key -> heading.
        rows: name -> key -> formatted value. Names are shown as they are, but for control characters.
        title: printed above.
    """
    table = Table(title=escape(printable(title)))
    table.add_column("")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for name, values in rows.items():
        table.add_row(escape(printable(name)), *(values.get(key, "–") for key in columns))
    Console(width=None if Console().is_terminal else 160).print(table)
