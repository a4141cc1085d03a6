"""Features of a network's inner layers, from a frozen copy of it."""

import copy
import difflib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["LayerExtractor", "layer_names", "spatial_scale"]


def layer_names(network: nn.Module) -> list[str]:
    """Names that `LayerExtractor` knows for this network: the nodes of its graph and the modules around them.

    Raises:
        ValueError: If torch.fx can't trace the network.
    """
    from torchvision.models.feature_extraction import get_graph_node_names

    try:
        nodes = get_graph_node_names(network, suppress_diff_warning=True)[1]
    except Exception as error:
        raise ValueError(f"extractor {type(network).__name__} can't be traced by torch.fx: {error}") from error
    names = {}
    for node in nodes:
        parts = node.split(".")
        names.update(dict.fromkeys(".".join(parts[: end + 1]) for end in range(len(parts))))
    return list(names)


def spatial_scale(feature_size: Sequence[int], image_size: Sequence[int]) -> float:
    """Feature cells per image pixel of a layer.

    The ratio of the sizes where it's the same whole stride along all axes. Elsewhere (sizes that the stride doesn't
    divide) the power of two nearest to it, as torchvision.ops.MultiScaleRoIAlign infers it.

    Args:
        feature_size: (h, w) of the features, or (d, h, w).
        image_size: (H, W) of the images, or (D, H, W).

    Raises:
        ValueError: If the axes differ in scale.
    """
    strides = {pixels / cells for cells, pixels in zip(feature_size, image_size, strict=True)}
    if len(strides) == 1 and next(iter(strides)).is_integer():
        return 1 / strides.pop()
    exponents = {round(math.log2(stride)) for stride in strides}
    if len(exponents) > 1:
        sizes = (" x ".join(map(str, size)) for size in (feature_size, image_size))
        raise ValueError("features must have one scale along all axes, got {} features of {} images".format(*sizes))
    return 2.0 ** -exponents.pop()


# Spatial dimensions -> images, features.
_LAYOUTS = {2: ("[N, C, H, W]", "[N, C, h, w]"), 3: ("[N, C, D, H, W]", "[N, C, d, h, w]")}


class LayerExtractor(nn.Module):
    """Features of chosen layers of a frozen copy of a network.

    The copy is taken at construction and stays in evaluation mode (BatchNorm on its running statistics) whatever
    `train` says; its parameters need no gradient, its inputs may. In-place activation modules are made out-of-place in
    the copy, so that a layer before one keeps its values. What lies behind the last chosen layer isn't computed.

    Args:
        network: Any module that torch.fx can trace and that takes images alone.
        layers: Names out of `layer_names(network)`, torchvision's node names (`features.17` of VGG19 is relu3_4); a
            module's name stands for its last node.
        mean: Subtracted from each channel before the network; None for nothing.
        std: Divides each channel after that; None for nothing.

    Raises:
        TypeError: If `network` isn't a module.
        ValueError: If the network can't be traced, there are no layers, a layer is unknown (naming near matches),
            or `mean` or `std` don't fit the network's channels.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        layers: Iterable[str],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"extractor must be a torch.nn.Module, got {type(network).__name__}")
        # Imported here: torchvision takes seconds, and `import lidnet_fast` stays light.
        from torchvision.models.feature_extraction import create_feature_extractor

        self.layers = tuple(layers)
        network = copy.deepcopy(network).eval().requires_grad_(False)
        for module in network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        _check_layers(self.layers, layer_names(network))
        nodes = {layer: layer for layer in self.layers}
        both_modes = create_feature_extractor(network, return_nodes=nodes, suppress_diff_warning=True)
        # Its evaluation graph alone: torchvision's module of two graphs goes into training mode when it's deep-copied.
        self.network = torch.fx.GraphModule(both_modes, both_modes.eval_graph)
        first = next((module for module in self.network.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)
        self.channels = None if first is None else first.in_channels
        self.dimensions = 3 if isinstance(first, nn.Conv3d) else 2
        self.register_buffer("mean", self._per_channel("mean", mean))
        self.register_buffer("std", self._per_channel("std", std))
        if std is not None and min(std) <= 0:
            raise ValueError(f"std must be above 0, got {tuple(std)}")
        self.train()

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
            ValueError: If the images have neither one channel nor the network's, or a layer isn't a feature map.
        """
        self.check_images(images)
        features = self.network(prepare_images(images, self.channels, self.mean, self.std))
        for layer in self.layers:
            if not isinstance(features[layer], Tensor) or features[layer].ndim != images.ndim:
                layout, got = _LAYOUTS[self.dimensions][1], _describe(features[layer])
                raise ValueError(f"layer {layer!r} must give features {layout}, got {got}")
        return {layer: features[layer] for layer in self.layers}

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images of other dimensions or channels than `forward` takes."""
        if images.ndim != self.dimensions + 2:
            raise ValueError(f"images must have shape {_LAYOUTS[self.dimensions][0]}, got {tuple(images.shape)}")
        if self.channels is not None and images.shape[1] not in (1, self.channels):
            either = " or ".join(map(str, sorted({1, self.channels})))
            raise ValueError(f"images must have {either} channels, got {images.shape[1]}")

    def _per_channel(self, name: str, values: Sequence[float] | None) -> Tensor | None:
        if values is None:
            return None
        if self.channels is not None and len(values) != self.channels:
            raise ValueError(
                f"{name} must have one value per channel of the extractor, {self.channels}, got {len(values)}"
            )
        # Where the network is, whatever the default device.
        device = next((parameter.device for parameter in self.network.parameters()), None)
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, *(1,) * self.dimensions)


def prepare_images(images: Tensor, channels: int | None, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Images as a network of so many input channels takes them: one channel repeated, less `mean`, over `std`."""
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
            near = difflib.get_close_matches(layer, known, n=5, cutoff=0.4)
            hint = f"near it are {', '.join(near)}" if near else f"there are {', '.join(known[:8])}, ..."
            raise ValueError(f"layers: the extractor has no layer {layer!r}; {hint}")


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
