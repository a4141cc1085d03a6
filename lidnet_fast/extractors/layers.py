"""Features of a network's inner layers, from a frozen copy of it."""

import copy
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx, nn

from lidnet_fast._checks import check_float
from lidnet_fast._plausibility import warn_of_range
from lidnet_fast._tensors import compute_dtype

from .networks import paper_names

if TYPE_CHECKING:
    from .tracing import Trace

__all__ = ["LayerExtractor", "feature_variance", "layer_names", "spatial_scale"]

# What networks trained on ImageNet expect of images in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# So many standard deviations does an image of the whole range spread over: 1 / 0.225 of ImageNet's.
_SPREAD = 4.5
_LEAST_VARIANCE = 1e-12


def layer_names(network: nn.Module) -> list[str]:
    """Names of layers that `LayerExtractor` and `ROIPerceptualLoss` know for this network.

    They are the nodes of its graph and the modules around them, as torchvision names them. Of a VGG, and of the first
    part of its `features`, the names of its paper stand first: "conv3_4", "relu3_4", "pool3".

    Raises:
        ValueError: If torch.fx can't trace the network.
    """
    return list(_traced(network).nodes)


def _traced(network: nn.Module) -> "Trace":
    """A frozen copy's graph, with all names of its layers."""
    # Imported here: it brings torchvision, which takes seconds, and `import lidnet_fast` stays light.
    from .tracing import trace

    traced = trace(_frozen_copy(network))
    of_paper = {name: traced.nodes[node] for name, node in paper_names(network).items()}
    traced.nodes = of_paper | traced.nodes
    return traced


def spatial_scale(feature_size: Sequence[int], image_size: Sequence[int]) -> float:
    """Feature cells per image pixel of a layer whose stride isn't known otherwise.

    The power of two nearest to the ratio of the sizes, as torchvision.ops.MultiScaleRoIAlign infers it.

    Args:
        feature_size: (h, w) of the features, or (d, h, w).
        image_size: (H, W) of the images, or (D, H, W).

    Raises:
        ValueError: If the axes differ in scale.
    """
    strides = [pixels / cells for cells, pixels in zip(feature_size, image_size, strict=True)]
    exponents = {round(math.log2(stride)) for stride in strides}
    if len(exponents) > 1:
        features, images = (" x ".join(map(str, size)) for size in (feature_size, image_size))
        raise ValueError(
            f"features must have one scale along all axes, got {features} features of {images} images. To fix, if "
            "channels come last: give a network that takes images of any size, or permutes them to the front"
        )
    return 2.0 ** -exponents.pop()


def feature_variance(features: Tensor) -> Tensor:
    """The variance of features [N, C, ...] over images and places, a scalar: the mean of the channels'."""
    features = features.to(compute_dtype(features.dtype))
    return features.var((0, *range(2, features.ndim))).mean().clamp_min(_LEAST_VARIANCE)


# Spatial dimensions -> images, features.
_LAYOUTS = {2: ("[N, C, H, W]", "[N, C, h, w]"), 3: ("[N, C, D, H, W]", "[N, C, d, h, w]")}


class LayerExtractor(nn.Module):
    """Features of chosen layers of a frozen copy of a network.

    The copy is taken at construction and stays in evaluation mode (BatchNorm on its running statistics) whatever
    `train` says; its parameters need no gradient, its inputs may. What works in place works out of place in the copy,
    so that a layer keeps its values. What lies behind the last chosen layer isn't computed. A layer whose channels
    come last, as in ConvNeXt and Swin, has them moved to the front.

    Args:
        network: Any module that torch.fx can trace and that takes images alone.
        layers: Names out of `layer_names(network)`; a module's name stands for what it returns, and a number for the
            module of that name.
        mean: Subtracted from each channel before the network; None for nothing. "imagenet": ImageNet's mean and std,
            for images in [0, 1].
        std: Divides each channel after that; None for nothing.

    Attributes:
        strides: Layer -> pixels per cell along each axis, None where the network takes images of one size only.

    Raises:
        TypeError: If `network` isn't a module.
        ValueError: If the network can't be traced, there are no layers, a layer is unknown (naming near matches), one
            depends on an operation in place that can't be rewritten (naming it), or `mean` or `std` don't fit the
            network's channels.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        layers: Iterable[str | int],
        *,
        mean: Sequence[float] | str | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"extractor must be a torch.nn.Module, got {type(network).__name__}")
        self.layers = tuple(map(str, layers))
        if isinstance(mean, str):
            if mean != "imagenet" or std is not None:
                raise ValueError(f'mean must be numbers, or "imagenet" without std, got {mean!r} and std {std!r}')
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        traced = _traced(network)
        _check_layers(self.layers, list(traced.nodes))
        self.network = traced.extract(self.layers)
        # Of a convolution with a forward of its own, the graph has the weight alone.
        modules = chain(self.network.modules(), traced.network.modules())
        first = next((module for module in modules if isinstance(module, nn.Conv2d | nn.Conv3d)), None)
        self.channels = None if first is None else first.in_channels
        self.dimensions = 3 if isinstance(first, nn.Conv3d) else 2
        self.register_buffer("mean", self._per_channel("mean", mean))
        self.register_buffer("std", self._per_channel("std", std))
        if std is not None and min(std) <= 0:
            raise ValueError(f"std must be above 0, got {tuple(std)}")
        self._largest_std = None if std is None else float(max(std))
        grids = probe(self.network, self.layers, self.channels or 1, self.dimensions)
        self.strides = {layer: grid and grid.strides for layer, grid in grids.items()}
        _channels_first(self.network, {layer: grid.dims for layer, grid in grids.items() if grid})
        self.train()

    @property
    def dtype(self) -> torch.dtype | None:
        """What the network computes in, without autocast; None if it has no parameters."""
        tensors = chain(self.network.parameters(), self.network.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

    def train(self, mode: bool = True) -> "LayerExtractor":
        """Stays in evaluation mode: the copy is frozen."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of the layers.

        Args:
            images: [N, C, H, W], or [N, C, D, H, W] for a network of 3-D convolutions, in the values that it expects
                before `mean` and `std`. One channel is repeated to the network's.

        Returns:
            Layer -> features [N, C_l, h_l, w_l], or [N, C_l, d_l, h_l, w_l], in the order of `layers`.

        Raises:
            TypeError: If the images are of a longer dtype than the network.
            ValueError: If the images have neither one channel nor the network's, or a layer isn't a feature map.
        """
        self.warn_of_images(images, "images")
        return self.features(images)

    @torch.no_grad()
    def variances(self, images: Tensor, name: str) -> Tensor:
        """The `feature_variance` of each layer, of images as `forward` takes them that can give one.

        Raises:
            TypeError: As `forward`, and if the images aren't a floating-point Tensor.
            ValueError: As `forward`, and if the images aren't finite, or the features of a layer are all alike.
        """
        check_float(name, images)
        pixels = self.accepted(images, name).flatten(2)
        self.warn_of_images(images, name)
        remedy = "To fix: give normal-dose images as forward takes them"
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity. {remedy}")
        if bool((pixels == pixels[..., :1]).all()):
            raise ValueError(f"{name} must have images that aren't constant, got shape {tuple(images.shape)}. {remedy}")
        variances = {layer: feature_variance(features) for layer, features in self.features(images).items()}
        for layer, variance in variances.items():
            if not bool((variance > _LEAST_VARIANCE) & variance.isfinite()):
                raise ValueError(
                    f"{name} must give layer {layer!r} features that vary, their variance is {variance.item():.3g}. "
                    f"{remedy}, or choose another layer"
                )
        return torch.stack(list(variances.values()))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """`forward` without the warning."""
        images = self.accepted(images)
        features = self.network(prepare_images(images, self.channels, self.mean, self.std))
        for layer in self.layers:
            if not isinstance(features[layer], Tensor) or features[layer].ndim != images.ndim:
                layout, got = _LAYOUTS[self.dimensions][1], _describe(features[layer])
                raise ValueError(f"layer {layer!r} must give features {layout}, got {got}")
        return {layer: features[layer] for layer in self.layers}

    def accepted(self, images: Tensor, name: str = "images") -> Tensor:
        """Images as the network computes with them: those of a shorter dtype converted to its own, without autocast.

        Raises:
            TypeError: For images of a longer dtype than the network.
            ValueError: For other dimensions or channels than `forward` takes.
        """
        if images.ndim != self.dimensions + 2:
            raise ValueError(f"{name} must have shape {_LAYOUTS[self.dimensions][0]}, got {tuple(images.shape)}")
        if self.channels is not None and images.shape[1] not in (1, self.channels):
            either = " or ".join(map(str, sorted({1, self.channels})))
            raise ValueError(f"{name} must have {either} channels, got {images.shape[1]}")
        dtype = self.dtype
        if dtype is None or images.dtype == dtype:
            return images
        # Autocast converts to its own dtype, but leaves float64 alone.
        if torch.float64 not in (dtype, images.dtype) and torch.is_autocast_enabled(images.device.type):
            return images
        if torch.promote_types(images.dtype, dtype) != dtype:
            raise TypeError(
                f"{name} must be of the extractor's dtype, {dtype}, or one that it holds exactly, got {images.dtype}. "
                f"To fix: {name}.to({dtype}), or move the module with .to({images.dtype})"
            )
        return images.to(dtype)

    def warn_of_images(self, images: Tensor, name: str) -> None:
        """Warn of images far from what `mean` and `std` suit, on the CPU only."""
        if self._largest_std is not None:
            remedy = "scale the images, or give the mean and std of images like them"
            warn_of_range(images, name, _SPREAD * self._largest_std, "mean and std suit a range of {}", remedy)

    def _per_channel(self, name: str, values: Sequence[float] | None) -> Tensor | None:
        if values is None:
            return None
        if not isinstance(values, Sequence | Tensor):
            raise TypeError(f"{name} must be one number per channel, such as ({values},), got {values!r}")
        if self.channels is not None and len(values) != self.channels:
            raise ValueError(
                f"{name} must have one value per channel of the extractor, {self.channels}, got {len(values)}"
            )
        # Where the network is, whatever the default device.
        device = next((parameter.device for parameter in self.network.parameters()), None)
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, *(1,) * self.dimensions)


class Grid(NamedTuple):
    """How a layer's cells lie on the images.

    Attributes:
        dims: The dimensions of its tensor: batch, channels, then the axes, depth or rows first.
        strides: Pixels per cell along each axis.
    """

    dims: tuple[int, ...]
    strides: tuple[Fraction, ...]


# An image's side, and how much is added to it: a multiple of all usual strides, powers of two or not.
_SIDE, _GROWTH = 512, 128 * 315


def probe(network: nn.Module, layers: Sequence[str], channels: int, dimensions: int) -> dict[str, Grid | None]:
    """The grid of each layer, None where it can't be seen, from the shapes that images of several sizes would give.

    Args:
        network: Images -> layer -> features. Nothing is computed, and its parameters' values aren't looked at.
        layers: The layers.
        channels: Of the images.
        dimensions: Spatial dimensions of the images.
    """
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    sizes = [[_SIDE + _GROWTH * (axis == grown) for axis in range(dimensions)] for grown in range(-1, dimensions)]
    try:
        with torch.device("meta"), torch.no_grad():
            shapes = [
                {layer: features.shape for layer, features in given.items()}
                for size in sizes
                for given in [
                    torch.func.functional_call(network, tensors, torch.empty(2, channels, *size, dtype=dtype))
                ]
            ]
    except Exception:  # whatever a network raises that takes one size only, or does what has no shapes on "meta"
        return dict.fromkeys(layers)
    return {layer: _grid([of_size[layer] for of_size in shapes]) for layer in layers}


def _grid(shapes: Sequence[Sequence[int]]) -> Grid | None:
    """The grid of a layer, from its shapes for the images and for those grown along each axis."""
    first, *grown = shapes
    moved = [[dim for dim in range(len(first)) if shape[dim] != first[dim]] for shape in grown]
    if len(first) != len(grown) + 2 or any(len(dims) != 1 for dims in moved):
        return None
    axes = [dim for (dim,) in moved]
    others = [dim for dim in range(len(first)) if dim not in axes]
    if len(others) != 2 or others[0] != 0:
        return None
    strides = tuple(Fraction(_GROWTH, shape[dim] - first[dim]) for shape, dim in zip(grown, axes, strict=True))
    return Grid((*others, *axes), strides)


def _channels_first(network: fx.GraphModule, dims: Mapping[str, Sequence[int]]) -> None:
    """Has a graph give layers, whose dimensions are these, in the usual order."""
    output = next(node for node in network.graph.nodes if node.op == "output")
    given = dict(output.args[0])
    for layer, order in dims.items():
        if tuple(order) != tuple(range(len(order))):
            with network.graph.inserting_before(output):
                given[layer] = network.graph.call_method("permute", (given[layer], *order))
    if given != output.args[0]:
        output.args = (given,)
        network.recompile()


def _frozen_copy(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters need no gradient.

    Raises:
        ValueError: If it can't be copied.
    """
    try:
        return copy.deepcopy(network).eval().requires_grad_(False)
    except RuntimeError as error:
        raise ValueError(
            f"extractor {type(network).__name__} can't be copied ({str(error).splitlines()[0]}). To fix: weights "
            "that hooks compute, as torch.nn.utils.weight_norm's, must be parametrizations, or plain ones"
        ) from error


def prepare_images(images: Tensor, channels: int | None, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Images as a network of `channels` takes them: one channel repeated, less `mean`, over `std`."""
    if channels is not None:
        images = images.expand(-1, channels, *images.shape[2:])
    if mean is not None:
        images = images - mean.to(images.dtype)
    return images if std is None else images / std.to(images.dtype)


def _check_layers(layers: Sequence[str], known: Sequence[str]) -> None:
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    for layer in layers:
        if layer not in known:
            numbered = [name for name in known if name.endswith(f".{layer}")]
            near = numbered or difflib.get_close_matches(layer, known, n=5, cutoff=0.4)
            hint = f"near it are {', '.join(near)}" if near else f"there are {', '.join(known[:8])}, ..."
            raise ValueError(
                f"layers: the extractor has no layer {layer!r}; {hint}. To fix: choose one of "
                "lidnet_fast.extractors.layer_names(extractor)"
            )


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
