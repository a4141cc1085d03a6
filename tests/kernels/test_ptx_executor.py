"""The executor of PTX by itself, on kernels of a few lines."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.kernels.ptx.arithmetic import OPERATIONS
from tests.kernels.ptx.executor import DeviceAssertionError, Executed, ExecutionError, execute
from tests.kernels.ptx.memory import GlobalMemory, MemoryAccessError, Uninitialised
from tests.kernels.ptx.program import parse

THREADS = 64
KERNEL = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid %d
{
    .reg .pred %%p<9>;
    ld.param.b64 %%rd1, [kernel_param_0];
    ld.param.b64 %%rd2, [kernel_param_1];
    mov.u32 %%r1, %%tid.x;
    mov.u32 %%r2, %%ctaid.x;
    mad.lo.s32 %%r3, %%r2, %d, %%r1;
    mul.wide.s32 %%rd3, %%r3, 4;
    add.s64 %%rd4, %%rd1, %%rd3;
    add.s64 %%rd5, %%rd2, %%rd3;
    %s
    ret;
}
"""
LOAD, STORE = "ld.global.b32 {%r4}, [%rd4];", "st.global.b32 [%rd5], {%r4};"


def run(body, source=None, result=None, blocks=2, uninitialised=None, constants=""):
    """What the kernel of `body` stores for each thread of all blocks, and what it did."""
    source = torch.arange(blocks * THREADS, dtype=torch.int32) if source is None else source
    result = torch.full((blocks * THREADS,), -7, dtype=torch.int32) if result is None else result
    memory, counts = GlobalMemory([source, result], uninitialised or Uninitialised()), Executed()
    program = parse(constants + KERNEL % (THREADS, THREADS, body))
    execute(program, [source.data_ptr(), result.data_ptr()], range(blocks), memory, 1024, counts, blocks)
    return result, counts


def test_threads_that_part_meet_again():
    """Each thread goes round its loop as often as its number says; warps issue it as often as their last thread."""
    body = f"""
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
$LOOP:
    setp.ge.s32 %p1, %r5, %r1;
    @%p1 bra $DONE;
    add.s32 %r5, %r5, 1;
    add.s32 %r4, %r4, 3;
    bra.uni $LOOP;
$DONE:
    add.s32 %r4, %r4, 1;
    {STORE}
    """
    result, counts = run(body)
    assert torch.equal(result, (3 * torch.arange(THREADS) + 1).int().repeat(2))
    assert counts.instructions["st.global.b32"] == 2 * 2  # warps of two blocks: all threads together again
    assert counts.instructions["bra.uni"] == 2 * (31 + 63)


def test_threads_that_part_over_two_ways():
    body = f"""
    and.b32 %r5, %r1, 1;
    setp.eq.s32 %p1, %r5, 0;
    @%p1 bra $EVEN;
    mov.b32 %r4, 11;
    bra.uni $DONE;
$EVEN:
    mov.b32 %r4, 22;
$DONE:
    {STORE}
    """
    assert torch.equal(run(body)[0], torch.tensor([22, 11]).int().repeat(THREADS))


def test_arithmetic_of_the_hardware():
    """21 / 7 by the reciprocal is more than 3, correctly rounded it is 3; conversions saturate, and NaN becomes 0."""
    source = torch.tensor([21.0, 1e20, -1e20, torch.nan] * 32)
    for division, ceiling in (("div.full.f32", 4), ("div.rn.f32", 3)):
        body = f"""
        ld.global.b32 {{%r5}}, [%rd4];
        {division} %r6, %r5, 0f40E00000;
        cvt.rpi.ftz.f32.f32 %r7, %r6;
        cvt.rzi.s32.f32 %r4, %r7;
        {STORE}
        """
        result, _ = run(body, source)
        assert result[:4].tolist() == [ceiling, 2**31 - 1, -(2**31), 0]


@pytest.mark.parametrize(
    ("opcode", "values", "expected"),
    [
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("shr.s32", (-8, 1), -4),
        ("shr.u32", (-8, 40), 0),
        ("shr.s32", (-8, 40), -1),
        ("shl.b32", (3, 32), 0),
        ("mul.hi.s32", (1 << 20, -(1 << 20)), -256),
        ("min.s32", (-1, 1), -1),
        ("min.u32", (-1, 1), 1),
        ("brev.b32", (6,), 0x60000000),
        ("bfind.shiftamt.u32", (6,), 29),
        ("bfind.shiftamt.u32", (0,), -1),
        ("prmt.b32", (0x44332211, -0x77665545, 0x1B50), 0x2200AA11),
    ],
)
def test_arithmetic_of_integers(opcode, values, expected):
    registers = [f"%r{number}" for number in range(5, 5 + len(values))]
    moved = "".join(f"mov.b32 {name}, {value}; " for name, value in zip(registers, values, strict=True))
    body = f"{moved}{opcode} %r4, {', '.join(registers)}; {STORE}"
    assert run(body)[0].unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("opcode", "of_nan"), [("lt", 0), ("ltu", 1), ("ne", 0), ("neu", 1), ("num", 0), ("nan", 1), ("eq", 0)]
)
def test_comparisons_of_nan(opcode, of_nan):
    body = f"mov.b32 %r5, 0f7FC00000; setp.{opcode}.f32 %p1, %r5, 0f3F800000; selp.b32 %r4, 1, 0, %p1; {STORE}"
    assert run(body)[0].unique().tolist() == [of_nan]


def test_comparisons_of_bfloat16():
    body = (
        f"mov.b16 %rs1, 0xBF80; mov.b16 %rs2, 0x3F80; setp.ltu.bf16 %p1, %rs1, %rs2; selp.b32 %r4, 1, 0, %p1; {STORE}"
    )
    assert run(body)[0].unique().tolist() == [1]  # -1 and 1


def test_bfloat16_is_rounded_to_nearest_even():
    values = torch.randn(2 * THREADS) * torch.logspace(-30, 30, 2 * THREADS)
    values[:3] = torch.tensor([torch.inf, 1.00390625, 3.3961775e38])  # a tie, and what rounds to infinity
    body = f"{LOAD} cvt.rn.bf16x2.f32 %r4, %r4, %r4; {STORE}"
    bits = run(body, values)[0].numpy().view(np.uint32)
    assert np.array_equal(bits & 0xFFFF, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(bits >> 16, bits & 0xFFFF)


@np.errstate(all="ignore")
def test_fused_multiply_add_of_float64_is_rounded_once():
    """Where nearly all of the product's digits are lost in the sum, and at random."""
    generator = np.random.default_rng(0)
    a, b, c = generator.standard_normal((3, 1000)) * np.exp2(generator.integers(-60, 60, (3, 1000)))
    c[:500] = -(a * b)[:500] * (1 + np.exp2(generator.integers(-60, -30, 500)))
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert np.array_equal(OPERATIONS[("fma",)](a, b, c), exact)
    huge = np.full(1, 1e308)
    assert OPERATIONS[("fma",)](huge, huge, -huge) == np.inf


@np.errstate(all="ignore")
def test_fast_reciprocal_of_float64():
    """Close to a millionth, of and in the upper 32 bits."""
    a = np.exp2(np.linspace(-300, 300, 999))
    reciprocal = OPERATIONS[("rcp", "ftz")](a)
    assert np.abs(reciprocal * a - 1).max() <= 2**-19
    assert not (reciprocal.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
    assert OPERATIONS[("rcp", "ftz")](np.array([0.0, np.inf])).tolist() == [np.inf, 0]


# The sum of the numbers up to a thread's, by a function that calls another one once for each.
FUNCTIONS = """
.func  (.param .b32 func_retval0) add(.param .b32 add_param_0, .param .b32 add_param_1)
;
.func  (.param .b32 func_retval0) sum(
    .param .b32 sum_param_0
)
{
    .reg .b32 %r<9>;
    ld.param.u32 %r1, [sum_param_0];
    mov.u32 %r2, 0;
$L__BB0_1:
    setp.lt.s32 %p1, %r1, 1;
    @%p1 bra $L__BB0_2;
    {
    .param .b32 param0;
    st.param.b32 [param0+0], %r2;
    .param .b32 param1;
    st.param.b32 [param1+0], %r1;
    .param .b32 retval0;
    call.uni (retval0),
    add,
    (
    param0,
    param1
    );
    ld.param.b32 %r2, [retval0+0];
    }
    add.s32 %r1, %r1, -1;
    bra.uni $L__BB0_1;
$L__BB0_2:
    st.param.b32 [func_retval0+0], %r2;
    ret;
}
.func  (.param .b32 func_retval0) add(.param .b32 add_param_0, .param .b32 add_param_1)
{
    ld.param.u32 %r1, [add_param_0];
    ld.param.u32 %r2, [add_param_1];
    setp.ne.s32 %p1, %r2, 2;
    @%p1 bra $L__BB1_1;
    add.s32 %r3, %r1, 100;
    st.param.b32 [func_retval0+0], %r3;
    ret;
$L__BB1_1:
    add.s32 %r3, %r1, %r2;
    st.param.b32 [func_retval0+0], %r3;
    ret;
}
"""


def test_functions_that_call_functions():
    """Threads leave loops and functions one by one; what a function calls its registers is its own affair."""
    call = """
    st.param.b32 [param0+0], %r4;
    call.uni (retval0), sum, (param0);
    ld.param.b32 %r4, [retval0+0];
    """
    lane = torch.arange(THREADS).int()
    twos = torch.where(lane >= 2, 98, 0)  # 2 counts as 100
    result, _ = run(
        f"{LOAD} {call} mov.u32 %r2, %r4; mov.u32 %r4, %r1; {call} add.s32 %r4, %r4, %r2; {STORE}",
        lane.repeat(2),
        constants=FUNCTIONS,
    )
    assert torch.equal(result, (2 * (lane * (lane + 1) // 2 + twos)).int().repeat(2))


def test_warps_exchange_values():
    body = f"{LOAD} shfl.sync.bfly.b32 %r4, %r4, 5, 31, -1; {STORE}"
    assert torch.equal(run(body)[0], (torch.arange(2 * THREADS) ^ 5).int())
    body = f"{LOAD} shfl.sync.up.b32 %r4, %r4, 4, 0, -1; {STORE}"
    lane = torch.arange(2 * THREADS)
    assert torch.equal(run(body)[0], torch.where(lane % 32 >= 4, lane - 4, lane).int())
    body = f"mov.b32 %r5, 2; redux.sync.add.s32 %r4, %r5, -1; {STORE}"
    assert run(body)[0].unique().tolist() == [64]
    numbers = torch.randint(-1000, 1000, (2 * THREADS,), dtype=torch.int32)
    for name, reduce in (("add", torch.sum), ("max", torch.amax), ("min", torch.amin)):
        body = f"{LOAD} redux.sync.{name}.s32 %r4, %r4, -1; {STORE}"
        assert torch.equal(run(body, numbers)[0], reduce(numbers.reshape(-1, 32), 1).int().repeat_interleave(32)), name


def test_blocks_share_memory_across_a_barrier():
    """Each thread reads what the thread at the other end of its own block wrote."""
    body = f"""
    {LOAD}
    shl.b32 %r5, %r1, 2;
    st.shared::cta.b32 [%r5], {{%r4}};
    bar.sync 0;
    sub.s32 %r6, 252, %r5;
    ld.shared.b32 %r4, [%r6];
    {STORE}
    """
    assert torch.equal(run(body)[0], torch.arange(2 * THREADS).view(2, -1).flip(1).reshape(-1).int())


def test_traffic_is_counted():
    """A scalar that all threads of a block load counts once per block; sectors are of a warp's 32 bytes."""
    _, counts = run(f"ld.global.b32 {{%r5}}, [%rd1]; {LOAD} {STORE}")
    assert (counts.loaded, counts.stored) == (2 * 4 + 2 * THREADS * 4, 2 * THREADS * 4)
    assert (counts.sectors_loaded, counts.sectors_stored) == (4 + 2 * THREADS // 8, 2 * THREADS // 8)
    strided = torch.zeros(2 * THREADS * 8, dtype=torch.int32)
    body = f"mul.wide.s32 %rd6, %r3, 32; add.s64 %rd7, %rd1, %rd6; ld.global.b32 {{%r4}}, [%rd7]; {STORE}"
    assert run(body, strided)[1].sectors_loaded == 2 * THREADS


def test_assertions_end_a_launch_with_their_message():
    text = ", ".join(map(str, b"no threads here"))
    constants = f".global .align 1 .b8 assertMessage_0[16] = {{{text}}};\n"
    body = f"""
    setp.lt.s32 %p1, %r1, LIMIT;
    @!%p1 bra $FAIL;
    mov.b32 %r4, 5;
    {STORE}
    ret;
$FAIL:
    {{ // callseq 0, 0
    .param .b64 param0;
    mov.b64 %rd6, assertMessage_0;
    cvta.global.u64 %rd7, %rd6;
    st.param.b64 [param0], %rd7;
    call.uni __assertfail, (param0, param1, param2, param3, param4);
    }} // callseq 0
    trap;
    """
    assert run(body.replace("LIMIT", str(THREADS)), constants=constants)[0].unique().tolist() == [5]
    with pytest.raises(DeviceAssertionError, match=r"^no threads here$"):
        run(body.replace("LIMIT", "9"), constants=constants)


FAULTS = {
    "beyond a tensor": (f"add.s64 %rd4, %rd4, 4; {LOAD}", MemoryAccessError, "outside"),
    "before a tensor": ("sub.s64 %rd4, %rd4, 4096; " + LOAD, MemoryAccessError, "outside"),
    "misaligned": ("add.s64 %rd4, %rd1, 2; " + LOAD, MemoryAccessError, "aligned"),
    "misaligned vector": (
        "add.s64 %rd4, %rd1, 8; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd4];",
        MemoryAccessError,
        "aligned",
    ),
    "two blocks": ("add.s64 %rd5, %rd2, 0; setp.eq.s32 %p1, %r1, 0; @%p1 " + STORE, MemoryAccessError, "two blocks"),
    "several threads": ("mov.b64 %rd5, %rd2; mov.b32 %r4, 1; " + STORE, ExecutionError, "several threads"),
    "shared memory nobody wrote": ("mov.b32 %r5, 16; ld.shared.b32 %r4, [%r5];", MemoryAccessError, "nobody wrote"),
    "outside of shared memory": ("mov.b32 %r5, 1024; ld.shared.b32 %r4, [%r5];", MemoryAccessError, "outside"),
    "part of a warp shuffles": (
        "setp.lt.s32 %p1, %r1, 9; @%p1 bra $ON; shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1; $ON: mov.b32 %r5, 0;",
        ExecutionError,
        "only some threads",
    ),
    "a barrier that some pass by": (
        "setp.lt.s32 %p1, %r1, 9; @%p1 bra $ON; bar.sync 0; $ON: bar.sync 0;",
        ExecutionError,
        "never come to",
    ),
    "an unknown instruction": ("fns.b32 %r4, %r1, 0, 1;", ExecutionError, "not modelled"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    body, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        run("mov.b32 %r4, 0; " + body)


def test_what_nobody_wrote_is_not_read():
    """Unless a kernel or PyTorch has written there meanwhile."""
    source, uninitialised = torch.empty(2 * THREADS, dtype=torch.int32), Uninitialised()
    uninitialised.add(source)
    with pytest.raises(MemoryAccessError, match="nobody wrote"):
        run(LOAD, source, uninitialised=uninitialised)
    copied = torch.arange(2 * THREADS, dtype=torch.int32)
    run(f"{LOAD} {STORE}", copied, source, uninitialised=uninitialised)
    assert torch.equal(run(f"{LOAD} {STORE}", source, uninitialised=uninitialised)[0], copied)
    other = torch.empty(2 * THREADS, dtype=torch.int32)
    uninitialised.add(other)
    other.zero_()
    assert not run(f"{LOAD} {STORE}", other, uninitialised=uninitialised)[0].any()
