"""What PTX's arithmetic gives, on arrays of lanes. Registers hold bits: unsigned integers, or bool for predicates.

As on the hardware: `div.full.f32` multiplies by the reciprocal, conversions to integers saturate and make 0 of NaN,
shifts by a register's width or more leave nothing, min and max prefer numbers to NaN. Not modelled: how MUFU rounds
reciprocals and square roots (here to nearest), and that ptxas may fuse a mul and an add that aren't `.rn`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TYPES: dict[str, np.dtype[Any]] = {
    **{
        f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
        for bits in (8, 16, 32, 64)
        for kind, code in (("b", "u"), ("u", "u"), ("s", "i"))
    },
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),  # numpy has none: its bits
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}


def bits_of(values: Array) -> Array:
    """The bits of values of any type, as a register holds them."""
    return values if values.dtype == np.bool_ else values.view(f"u{values.dtype.itemsize}")


def as_type(bits: Array, dtype: np.dtype[Any]) -> Array:
    """A register's bits as values; of a narrower type the lower bits, of a wider one with zeros above."""
    if bits.dtype == np.bool_ or bits.dtype.itemsize == dtype.itemsize:
        return bits if bits.dtype == np.bool_ else bits.view(dtype)
    return bits.astype(f"u{dtype.itemsize}").view(dtype)


def widen_bf16(bits: Array) -> Array:
    """float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bf16(values: Array) -> Array:
    """bfloat16's bits of float32: to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush(values: Array) -> Array:
    """`ftz`: subnormal numbers count as 0."""
    return np.where(np.abs(values) < np.finfo(values.dtype).tiny, values.dtype.type(0), values)


def convert(values: Array, source: str, target: str, modifiers: set[str]) -> Array:
    """`cvt` of values from one type to another; `modifiers` say how to round."""
    if source == "bf16":
        values, source = widen_bf16(values), "f32"
    if target == "bf16":
        return round_to_bf16(values)
    to = TYPES[target]
    floating = source.startswith("f")
    if "ftz" in modifiers:
        values = flush(values)
    if floating:
        rounding = {"rpi": np.ceil, "rmi": np.floor, "rni": np.rint, "rzi": np.trunc}
        for name in modifiers & rounding.keys():
            values = rounding[name](values)
    if floating and to.kind in "iu":
        least, most = np.iinfo(to).min, np.iinfo(to).max
        wide = np.nan_to_num(values.astype(np.float64), nan=0.0)
        inside = (wide >= least) & (wide < float(most))
        return np.where(inside, np.where(inside, wide, 0).astype(to), np.where(wide < 0, to.type(least), to.type(most)))
    return values.astype(to)


def _quotient(a: Array, b: Array) -> Array:
    """Of integers, towards 0; of a division by 0, which PTX leaves open, 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(0), quotient)


def _shift(a: Array, by: Array, left: bool) -> Array:
    width = a.dtype.itemsize * 8
    amount = np.minimum(by, np.uint32(width - 1)).astype(a.dtype)
    shifted = a << amount if left else a >> amount
    keeps_sign = not left and a.dtype.kind == "i"
    return shifted if keeps_sign else np.where(by >= width, a.dtype.type(0), shifted)


def _widened(a: Array) -> np.dtype[Any]:
    return np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")


def _product(a: Array, b: Array, part: str) -> Array:
    if part == "lo":
        return a * b
    if a.dtype.itemsize == 8:  # numpy has no wider integers: Python's
        wide = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
        return np.array([(product >> 64) & (2**64 - 1) for product in wide], np.uint64).view(a.dtype)
    wide = a.astype(_widened(a)) * b.astype(_widened(a))
    return wide if part == "wide" else (wide >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """Rounded once, but for float32's rare ties and float64's numbers above 1e300, which are rounded twice.

    Of float64: Boldo and Melquiond, "Emulation of a FMA and correctly-rounded sums: proved algorithms using rounding to
    odd", 2008.
    """
    if a.dtype != np.float64:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)
    product, product_rest = _exact_product(a, b)
    lower, lower_rest = _exact_sum(c, product_rest)
    upper, upper_rest = _exact_sum(product, lower)
    fused = upper + _sum_to_odd(lower_rest, upper_rest)
    return np.where(np.isfinite(fused), fused, a * b + c)


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum, and what was rounded off (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _exact_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The product of float64, and what was rounded off (Dekker)."""
    product = a * b
    (a_upper, a_lower), (b_upper, b_lower) = ((x_upper, x - x_upper) for x, x_upper in ((a, _upper(a)), (b, _upper(b))))
    return product, a_lower * b_lower - (((product - a_upper * b_upper) - a_lower * b_upper) - a_upper * b_lower)


def _upper(a: Array) -> Array:
    """The upper half of float64's digits (Veltkamp)."""
    scaled = a * 134217729.0
    return scaled - (scaled - a)


def _sum_to_odd(a: Array, b: Array) -> Array:
    """The sum of float64; of the two numbers around one that isn't exact, that whose last bit is 1."""
    total, rest = _exact_sum(a, b)
    even = total.view(np.int64) & 1 == 0
    return np.where(even & (rest != 0), np.nextafter(total, np.copysign(np.inf, rest)), total)


def _fast_reciprocal(a: Array) -> Array:
    """`rcp.approx.ftz`: of float64 the upper 32 bits make the upper 32, and the lower ones are 0."""
    if a.dtype != np.float64:
        return flush(a.dtype.type(1) / flush(a))
    upper = np.uint64(0xFFFFFFFF00000000)
    reciprocal = flush(1 / flush((a.view(np.uint64) & upper).view(np.float64)))
    return (reciprocal.view(np.uint64) & upper).view(np.float64)


def _extracted(a: Array, position: Array, length: Array) -> Array:
    """`bfe`: `length` bits from `position` on."""
    mask = (np.uint32(1) << length.view(np.uint32)) - np.uint32(1)
    field = (a.view(np.uint32) >> position.view(np.uint32)) & mask
    if a.dtype.kind == "i":
        sign = (field >> (length.view(np.uint32) - np.uint32(1))) & np.uint32(1)
        field = np.where(sign == 1, field | ~mask, field)
    return field.view(a.dtype)


def _reversed(a: Array) -> Array:
    """`brev`: the bits in the opposite order."""
    for width in (1, 2, 4, 8, 16):
        mask = np.uint32(0xFFFFFFFF // (2**width + 1))
        a = ((a & mask) << np.uint32(width)) | ((a >> np.uint32(width)) & mask)
    return a


def _shift_to_top(a: Array) -> Array:
    """`bfind.shiftamt`: how far the highest bit of 1 is from the top."""
    highest = np.frexp(a.astype(np.float64))[1] - 1
    return np.where(a == 0, np.uint32(0xFFFFFFFF), (31 - highest).astype(np.uint32))


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """`prmt`: each of four bytes is one of b's and a's eight, or its sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for place in range(4):
        chosen = selector >> np.uint32(4 * place)
        byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte >> np.uint32(7) == 1, np.uint32(0xFF), np.uint32(0))
        result |= np.where(chosen & np.uint32(8) != 0, sign, byte) << np.uint32(8 * place)
    return result


# Modifiers that change nothing that is modelled.
ROUNDED = {"rn", "approx", "sync", "aligned", "uni"}

# Opcode and the modifiers that matter -> the result of operands in the instruction's type.
OPERATIONS: dict[tuple[str, ...], Callable[..., Array]] = {
    ("add",): lambda a, b: a + b,
    ("sub",): lambda a, b: a - b,
    ("mul",): lambda a, b: a * b,
    ("div",): lambda a, b: a / b if a.dtype.kind == "f" else _quotient(a, b),
    ("div", "full"): lambda a, b: a * (b.dtype.type(1) / b),
    ("rem",): lambda a, b: a - _quotient(a, b) * b,
    ("min",): lambda a, b: np.fmin(a, b),
    ("max",): lambda a, b: np.fmax(a, b),
    ("abs",): np.abs,
    ("neg",): lambda a: -a,
    ("sqrt",): np.sqrt,
    ("sqrt", "ftz"): lambda a: np.sqrt(flush(a)),
    ("rcp",): lambda a: a.dtype.type(1) / a,
    ("rcp", "ftz"): _fast_reciprocal,
    ("copysign",): lambda a, b: np.copysign(b, a),
    ("and",): lambda a, b: a & b,
    ("or",): lambda a, b: a | b,
    ("xor",): lambda a, b: a ^ b,
    ("not",): lambda a: ~a,
    ("mov",): lambda a: a,
    ("cvta", "to", "global"): lambda a: a,
    ("cvta", "global"): lambda a: a,
    ("mul", "lo"): lambda a, b: _product(a, b, "lo"),
    ("mul", "hi"): lambda a, b: _product(a, b, "hi"),
    ("mul", "wide"): lambda a, b: _product(a, b, "wide"),
    ("mad", "lo"): lambda a, b, c: a * b + c,
    ("mad", "wide"): lambda a, b, c: _product(a, b, "wide") + c,
    ("fma",): _fused,
    ("shl",): lambda a, b: _shift(a, b, left=True),
    ("shr",): lambda a, b: _shift(a, b, left=False),
    ("bfe",): _extracted,
    ("brev",): _reversed,
    ("bfind", "shiftamt"): _shift_to_top,
    ("prmt",): _permuted,
}


def compare(kind: str, a: Array, b: Array) -> Array:
    """`setp`: ordered comparisons are false of NaN, those that end in u are true."""
    floating = a.dtype.kind == "f"
    unordered = np.isnan(a) | np.isnan(b) if floating else np.zeros(a.shape, np.bool_)
    if kind in ("num", "nan"):
        return unordered if kind == "nan" else ~unordered
    relations: dict[str, Callable[[Array, Array], Array]] = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    result = relations[kind[:2]](a, b)
    return result | unordered if kind.endswith("u") else result & ~unordered
