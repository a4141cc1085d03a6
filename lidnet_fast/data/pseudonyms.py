"""Pseudonyms of patients and series: keyed hashes, which whoever has the key makes again and nobody else undoes."""

import csv
import dataclasses
import hashlib
import hmac
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, write_text
from lidnet_fast.strangers_text import csv_cell

T = TypeVar("T", Series, SeriesInfo)

_SHORTEST_KEY = 32
_LONGEST_KEY = 4096
_COLUMNS = ("kind", "id", "pseudonym")


@dataclasses.dataclass(frozen=True)
class Pseudonyms:
    """What a key makes of ids: HMAC-SHA256, cut to 128 bits.

    Attributes:
        key: the secret.
        file: where it was read from.
    """

    key: bytes = dataclasses.field(repr=False)
    file: Path

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Take the whole content of a file as the key.

        Raises:
            InputError: it can't be read, others can read it, or it is too short to be a secret.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: there is no such key file. To fix: head -c 32 /dev/urandom > {path}")
        if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"{path}: is a key that others may read or change. To fix: chmod 600 {path}")
        with path.open("rb") as file:
            key = file.read(_LONGEST_KEY + 1)
        if not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
            raise InputError(
                f"{path}: a key has {_SHORTEST_KEY} to {_LONGEST_KEY} bytes. To fix: head -c 32 /dev/urandom > {path}"
            )
        return cls(key, path)

    @property
    def fingerprint(self) -> str:
        """Tells this key from others and nothing of it."""
        return self._digest("key", "").hex()[:16]

    def patient(self, patient_id: str) -> str:
        """The pseudonym of a patient: 32 hexadecimal digits."""
        return self._digest("patient", patient_id).hex()

    def series(self, series_uid: str) -> str:
        """The pseudonym of a series: a DICOM UID made of a number of 128 bits."""
        return f"2.25.{int.from_bytes(self._digest('series', series_uid), 'big')}"

    def info(self, info: T) -> T:
        """What is known of a series, under its pseudonyms."""
        return dataclasses.replace(
            info, series_uid=self.series(info.series_uid), patient_id=self.patient(info.patient_id)
        )

    def split(self, record: Any) -> Any:
        """A store's record of how its patients were split, with their pseudonyms."""
        if not isinstance(record, dict):
            return record
        by_patient = ("patients", "given")
        return {
            name: {self.patient(patient): split for patient, split in value.items()}
            if name in by_patient
            else self.split(value)
            for name, value in record.items()
        }

    def _digest(self, kind: str, name: str) -> bytes:
        message = f"lidnet_fast {kind}\0{name}".encode(errors="surrogatepass")
        return hmac.digest(self.key, message, hashlib.sha256)[:16]


def chosen_pseudonyms(key_file: str | Path | None, table: str | Path | None) -> Pseudonyms | None:
    """Read the key that a user names, if any, and check the table that is to be written.

    Raises:
        InputError: the key can't be used; the table is asked for without one, or would replace something else.
    """
    if key_file is None:
        if table is not None:
            raise InputError(f"pseudonym_table ({table}) needs pseudonymise. To fix: give both or neither")
        return None
    if table is not None:
        _check_table(Path(table))
    return Pseudonyms.read(key_file)


def _check_table(path: Path) -> None:
    """Refuse to overwrite a file that isn't a table of pseudonyms."""
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(",".join(_COLUMNS).encode())):
        raise InputError(f"{path}: exists already and isn't a table of pseudonyms. To fix: choose another name")


def write_table(path: Path, pseudonyms: Pseudonyms, series: Sequence[Series | SeriesInfo]) -> None:
    """Write which pseudonym stands for which id, readable by the user alone.

    Args:
        path: the CSV file to make.
        pseudonyms: of the ids.
        series: under their own ids.
    """
    of_series = {("series", one.series_uid, pseudonyms.series(one.series_uid)) for one in series}
    of_patients = {("patient", one.patient_id, pseudonyms.patient(one.patient_id)) for one in series}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    table.writerows(map(csv_cell, row) for row in sorted(of_series | of_patients))
    with as_private_as([pseudonyms.file]):
        write_text(path, text.getvalue())
