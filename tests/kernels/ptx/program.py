"""PTX text, parsed: instructions with their predicates and operands, labels, and the kernel's parameters."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.b32 {%r1}, [%rd1]`: predicate "%p1", negated, opcode ("ld", "global", "b32"), two operands."""

    text: str
    predicate: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A kernel. Labels name the index of the instruction that follows; parameters are named in their order.

    Texts are the constants that assertions name, by their symbols.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]
    threads: int  # of a block, along x
    texts: dict[str, str]


_INSTRUCTION = re.compile(
    r"(?:@(?P<not>!?)(?P<predicate>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL
)


def parse(ptx: str) -> Program:
    """The only kernel in `ptx`, as Triton compiles it. Raises ValueError for a line that isn't PTX."""
    text = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+\w+\s*\((?P<parameters>.*?)\)(?P<directives>[^{]*)\{", text, re.DOTALL)
    threads = re.search(r"\.reqntid\s+(\d+)", entry["directives"]) if entry else None
    if entry is None or threads is None:
        raise ValueError("no .entry with a .reqntid in this PTX")
    parameters = re.findall(r"(\w+)\s*(?:,|$)", entry["parameters"].strip())
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(text[entry.end() :]):
        if label := re.fullmatch(r"(\$?\w+):", statement):
            labels[label[1]] = len(instructions)
        elif not statement.startswith("."):
            found = _INSTRUCTION.fullmatch(statement)
            if found is None:
                raise ValueError(f"not an instruction: {statement}")
            opcode = tuple(re.split(r"\.|::", found["opcode"]))
            operands = tuple(_operands(found["operands"]))
            instructions.append(Instruction(statement, found["predicate"], found["not"] == "!", opcode, operands))
    texts = {
        name: bytes(map(int, values.split(","))).decode()
        for name, values in re.findall(r"\.global [^;]*?\.b8 (assert\w+)\[\d+\] = \{([^}]*)\};", text)
    }
    return Program(instructions, labels, parameters, int(threads[1]), texts)


def _statements(body: str) -> list[str]:
    """Labels and what ends in a semicolon; the braces of scopes (inline assembly, the body's own) are dropped."""
    statements = []
    for line in re.sub(r"(\$\w+:)", r"\1;", body).split(";"):
        # Directives end with their line (.loc) or their semicolon (.reg).
        statement = re.sub(r"^(?:\s*\.(?:loc|file|pragma)[^\n]*(?:\n\s*|$))+", "", line).strip()
        # A scope's brace stands at a statement's start or end; an operand's is inside, in a pair.
        while statement.startswith(("{", "}")):
            statement = statement[1:].strip()
        while statement.endswith("}") and statement.count("}") > statement.count("{"):
            statement = statement[:-1].strip()
        if statement.startswith(".section"):
            break
        if statement:
            statements.append(statement)
    return statements


def _operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]
