"""torch.compile, torch.export and the defaults of dtype and device, in fresh processes."""

import torch

from .cases import Case
from .cells import cell, check


@cell("torch.set_default_dtype(torch.float64)", fresh=True)
def _(case: Case) -> None:
    """Value, gradient and their dtypes, which the inputs decide."""
    x, t, b = case.tensors()
    dtype = case.build()(x, t, b).dtype
    torch.set_default_dtype(torch.float64)
    try:
        check(case, case.build(), x, t, b)
        assert case.build()(x, t, b).dtype == dtype, "dtype: the default dtype decides"
    finally:
        torch.set_default_dtype(torch.float32)
