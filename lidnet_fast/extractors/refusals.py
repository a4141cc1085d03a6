"""Why a node of a network has no finite receptive field."""

__all__ = ["RefusedError", "why"]


class RefusedError(Exception):
    """A node depends on more than a finite part of the image, or what it does isn't known; the message says why."""


def why(name: str) -> str:
    """Why a module or function of this name isn't supported, and what would be."""
    lower = name.lower()
    if "adaptive" in lower or lower in ("mean", "sum", "amax", "max"):
        return f"{name} pools over the whole image; choose a layer before it"
    if "attention" in lower or "softmax" in lower or "matmul" in lower:
        return f"{name} mixes places far apart in the image; choose a layer before it"
    if any(norm in lower for norm in ("groupnorm", "group_norm", "instancenorm", "instance_norm", "layernorm")):
        return f"{name} normalises over the whole image; evaluation BatchNorm doesn't"
    if "transpose" in lower:
        return f"{name} isn't supported; upsampling by a whole factor and a convolution are"
    if lower in ("getattr", "size", "shape"):
        return "the size of a map is used in computations; fixed sizes and scale_factor aren't a problem"
    return f"{name} isn't known to keep to a receptive field; choose a layer before it"
