"""What of a store's URL is shown and kept, everywhere."""

from pathlib import Path

import pytest

from lidnet_fast.cli import main
from lidnet_fast.errors import InputError
from lidnet_fast.urls import without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://anna:pw@host/store", "http://host/store"),
        ("s3://key:a/b@c:d@bucket/store", "s3://key@bucket/store"),
        ("https://token@host:80/a", "https://host:80/a"),
        ("HTTPS://:pw@host/a", "HTTPS://host/a"),
        ("simplecache::https://u:p@h/a?sig=1&x=2", "simplecache::https://h/a"),
        ("s3://bucket/store?versionId=3 and 'http://h?t=1'", "s3://bucket/store and 'http://h'"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("memory://bucket: isn't a store, x@y", "memory://bucket: isn't a store, x@y"),
        ("/data/a:b@c?d", "/data/a:b@c?d"),
        ("C:/data/a:b@c?d", "C:/data/a:b@c?d"),
        ("/data/http:/u:p@host/a?b", "/data/http:/host/a"),
    ],
)
def test_secrets_of_urls(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert without_secrets(f"{url}\n{url}") == f"{shown}\n{shown}"
    assert str(InputError(url)) == shown


SECRET = "http://anna:s3cr3t@localhost:1/store?sig=t0k3n"


def test_errors_of_commands_show_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (
        ["train", "--data.store", SECRET, "--out", str(tmp_path / "run")],
        ["bench", "--data.store", SECRET],
        ["evaluate", "--store", SECRET, "--images", "a=b"],
        ["export", SECRET, str(tmp_path / "out")],
        ["prepare", SECRET, "--out", str(tmp_path / "store")],
        ["train", "--data.stoer", SECRET],
        [SECRET],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        shown = "".join(capsys.readouterr())
        assert shown.count("\n") == 1, shown
        assert "s3cr3t" not in shown, arguments
        assert "t0k3n" not in shown, arguments
    assert list(tmp_path.iterdir()) == []
