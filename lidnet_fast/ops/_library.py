"""Where the ops are defined."""

from typing import Any

import torch

library = torch.library.Library("lidnet_fast", "DEF")


def define(schema: str) -> None:
    """Define an op that follows what torch.compile and torch.export ask of it."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    """The backward of a backward that has none."""
    raise NotImplementedError(
        "the fused losses can't be differentiated twice; "
        'lidnet_fast.backend.use("reference") chooses the definition, which can'
    )
