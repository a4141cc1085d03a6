"""What strangers' files hold can't act on a terminal or in a spreadsheet."""

import pytest

from lidnet_fast.cli import main
from lidnet_fast.report.terminal import print_table
from lidnet_fast.strangers_text import csv_cell, printable


def test_control_characters_are_escaped():
    assert printable("a\x1b[2J\x07\r\x9b\u202e\u0000b\nc é 層") == "a\\x1b[2J\\x07\\r\\x9b\\u202e\\x00b\nc é 層"


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_cells_are_no_formulas(start):
    assert csv_cell(f"{start}1+2") == f"'{start}1+2"
    assert csv_cell("1.2.3") == "1.2.3"
    assert csv_cell(f"1.2{start}3\n4") == f"1.2{start}3 4"


def test_errors_of_commands_are_escaped(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "run\x1b[2J\x07")])
    message = capsys.readouterr().err
    assert "run\\x1b[2J\\x07" in message
    assert message.count("\n") == 1
    assert "\x1b" not in message


@pytest.mark.parametrize("name", ["[/x]", "[bold]mine", "a\x1b[2Jb"])
def test_names_in_tables_are_no_markup(capsys, name):
    print_table({"psnr": "PSNR"}, {name: {"psnr": "30.1"}}, f"run {name}")
    shown = capsys.readouterr().out
    assert shown.count(printable(name)) == 2
    assert "\x1b" not in shown
