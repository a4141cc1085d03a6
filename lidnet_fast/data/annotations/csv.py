"""Reading the CSV files that users write, with errors that name the file, the line and the cause."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.errors import InputError


def read_rows(
    path: Path, columns: Sequence[str], alternatives: Sequence[str] = ()
) -> tuple[str | None, list[tuple[int, dict[str, str]]]]:
    """Read a CSV file (UTF-8, comma-separated, names of the columns in the first line, in any order).

    Args:
        path: the file.
        columns: columns that it must have.
        alternatives: columns of which it must have exactly one; it may have no others.

    Returns:
        The alternative it has (None without `alternatives`), and its rows as (line number, values by column).

    Raises:
        InputError: naming the file, the line and the cause.
    """
    wanted = ",".join(columns) + (f" and one of {', '.join(alternatives)}" if alternatives else "")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, [value.strip() for value in row]) for row in reader if row]
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: can't be read as CSV: {error}") from error
    chosen = [name for name in alternatives if name in header]
    faults = [f"column {name} is missing" for name in columns if name not in header]
    faults += [f"column {name!r} is unknown" for name in header if name not in (*columns, *alternatives)]
    faults += [f"column {name} is there twice" for name in sorted(set(header)) if header.count(name) > 1]
    if alternatives and len(chosen) != 1:
        faults.append(f"it has {' and '.join(chosen) or 'none'} of {', '.join(alternatives)}")
    if faults:
        raise InputError(f"{path}, line 1: {'; '.join(faults)}; its columns must be {wanted}")
    rows = []
    for number, values in lines:
        if len(values) != len(header):
            raise InputError(f"{path}, line {number}: has {len(values)} values for {len(header)} columns")
        row = dict(zip(header, values, strict=True))
        empty = [name for name, value in row.items() if not value]
        if empty:
            raise InputError(f"{path}, line {number}: {empty[0]} is empty")
        rows.append((number, row))
    return (chosen[0] if chosen else None), rows


def number(row: dict[str, str], column: str, where: str) -> float:
    """Return a row's value as a finite number.

    Raises:
        InputError: it isn't one; `where` begins the message.
    """
    return numbers(row, column, 1, where)[0]


def numbers(row: dict[str, str], column: str, count: int, where: str) -> tuple[float, ...]:
    """Return a row's value as finite numbers with commas between them.

    Raises:
        InputError: it isn't `count` of them; `where` begins the message.
    """
    text = row[column] or ""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not np.isfinite(values).all() or "_" in text:
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise InputError(f"{where}: {column} {row[column]!r} isn't {wanted}")
    return values


def whole_number(row: dict[str, str], column: str, where: str) -> int:
    """Return a row's value as a whole number of 32 bits.

    Raises:
        InputError: it isn't one; `where` begins the message.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", row[column]) or abs(int(row[column])) >= 2**31:
        raise InputError(f"{where}: {column} {row[column]!r} isn't a whole number")
    return int(row[column])
