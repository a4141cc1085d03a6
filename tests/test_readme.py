"""The README's Python examples run as they stand."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_run() -> None:
    examples = [
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "runs/mine" not in code
    ]
    assert len(examples) == 2
    scope: dict = {}
    for example in examples:
        exec(example, scope)
    assert scope["value"].requires_grad
    assert scope["features"].grad.abs().sum() > 0
    assert scope["denoised"].grad.abs().sum() > 0


def test_commands_exist() -> None:
    from lidnet_fast.cli import COMMANDS

    named = set(re.findall(r"lidnet-fast (\w+)", README.read_text()))
    assert named and named <= set(COMMANDS)
