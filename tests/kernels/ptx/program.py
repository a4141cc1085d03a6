"""PTX text, parsed: instructions with their predicates and operands, labels, and the kernel's parameters.

Functions are put in the place of their calls, with registers, labels and variables of their own for each.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
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
    """A kernel. Labels name the index of the instruction that follows.

    Texts are the constants that assertions name, by their symbols.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: dict[str, range]  # in their order; the bytes of each in the memory of parameters
    threads: int  # of a block, along x
    texts: dict[str, str]
    shared: dict[str, range]  # variables in shared memory, and the bytes of each; none of Triton's, which has one


_INSTRUCTION = re.compile(
    r"(?:@(?P<not>!?)(?P<predicate>%\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL
)
_FUNCTION = re.compile(
    r"\.func\s+(?:\(\s*\.param\s+\.\w+\s+(?P<result>\w+)\s*\)\s*)?(?P<name>\w+)\s*"
    r"\((?P<parameters>[^)]*)\)\s*\{(?P<body>.*?)\n\}",
    re.DOTALL,
)
_CALL = re.compile(
    r"call(?:\.uni)?\s+(?:\(\s*(?P<result>\w+)\s*\)\s*,\s*)?(?P<name>\w+)\s*,\s*\((?P<arguments>[^)]*)\)"
)
# What is a function's own: labels, registers but the special ones (%tid.x), and the variables of its calls.
_OWN = re.compile(r"\$\w+|%(?:[a-z]{1,2}\d+|temp)\b|\b(?:param|retval)\d+\b")
# Of a variable: how it is aligned, bits of an element, name, elements.
_VARIABLE = r"\.SPACE\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)[^,;\[]*?(\w+)\s*(?:\[(\d+)\])?\s*(?=[,;]|$)"


def parse(ptx: str, kernel: str = "") -> Program:
    """A kernel in `ptx`, as Triton or nvcc compile it: the one whose name holds `kernel`, where there are several.

    Raises:
        ValueError: No such kernel, or a line that isn't PTX.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    name = rf"\.entry\s+\w*{kernel}\w*\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{{]*)\{{"
    entry = re.search(name, text)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry["directives"]) if entry else None
    if entry is None or threads is None:
        raise ValueError(f"no .entry {kernel} with a .reqntid or .maxntid in this PTX")
    body = text[entry.end() :].partition("\n}")[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    functions = {function["name"]: function for function in _FUNCTION.finditer(text)}
    for statement in _inlined(_statements(body), functions, itertools.count()):
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
    parameters, shared = (
        _places(space, among) for space, among in (("param", entry["parameters"].strip()), ("shared", body))
    )
    return Program(instructions, labels, parameters, int(threads[1]), texts, shared)


def _inlined(statements: Sequence[str], functions: Mapping[str, re.Match[str]], calls: Iterator[int]) -> Iterator[str]:
    """The statements, with a function's in place of each call of it."""
    for statement in statements:
        call = _CALL.fullmatch(statement)
        function = functions.get(call["name"]) if call else None
        if call is None or function is None:
            yield statement
        else:
            after = f"after_{next(calls)}"
            body = _inlined(_statements(function["body"]), functions, calls)
            yield from (_in_place(inner, call, function, after) for inner in body)
            yield f"${after}:"


def _in_place(statement: str, call: re.Match[str], function: re.Match[str], after: str) -> str:
    """A function's statement as that of a call; `after` is the label behind it, and in the names of what is its own."""
    parameters = re.findall(r"\w+(?=\s*(?:,|$))", function["parameters"])
    names = dict(zip(parameters, _operands(call["arguments"]), strict=True)) | {function["result"]: call["result"]}
    own = _OWN.sub(lambda found: f"{found[0]}_{after}", statement)
    own = re.sub(r"\bret$", f"bra ${after}", own)
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), own)


def _places(space: str, text: str) -> dict[str, range]:
    """The variables that are declared in a space of memory, one after the other: name -> its bytes."""
    places, end = {}, 0
    for align, bits, name, length in re.findall(_VARIABLE.replace("SPACE", space), text):
        size = int(bits) // 8 * int(length or 1)
        start = -(-end // int(align or size)) * int(align or size)
        places[name], end = range(start, start + size), start + size
    return places


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
