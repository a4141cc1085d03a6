"""Torchvision's networks and three layers of each: the table of docs/extractors.md.

python -m tests.extractors.zoo --write    # brings the table up to date
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import nn

from lidnet_fast.extractors import LayerExtractor, load_network
from lidnet_fast.extractors.networks import outline_network
from lidnet_fast.extractors.receptive_field import LayerGraph, ReceptiveField

# Shallow, middle and deep, as perceptual losses use them.
LAYERS = {
    "alexnet": ("features.0", "features.4", "features.11"),
    "vgg16": ("features.3", "features.15", "features.22"),
    "vgg19_bn": ("features.5", "features.24", "features.37"),
    "resnet18": ("relu", "layer1", "layer2"),
    "resnet50": ("layer1.0", "layer1", "layer2"),
    "resnext50_32x4d": ("layer1.0", "layer1", "layer2"),
    "wide_resnet50_2": ("conv1", "layer1.0", "layer1"),
    "densenet121": ("features.pool0", "features.denseblock1", "features.denseblock2"),
    "squeezenet1_1": ("features.0", "features.5", "features.12"),
    "googlenet": ("conv1.bn", "conv3", "inception3b"),
    "inception_v3": ("Conv2d_1a_3x3.bn", "Mixed_5b", "Mixed_6a"),
    "mobilenet_v2": ("features.1", "features.3", "features.6"),
    "mobilenet_v3_large": ("features.1", "features.3", "features.6"),
    "mnasnet1_0": ("layers.6", "layers.8", "layers.9"),
    "shufflenet_v2_x1_0": ("maxpool", "stage2", "stage3"),
    "efficientnet_b0": ("features.0", "features.1", "features.3"),
    "efficientnet_v2_s": ("features.1", "features.3", "features.4"),
    "regnet_x_400mf": ("stem", "trunk_output.block1", "trunk_output.block2"),
    "regnet_y_400mf": ("stem", "trunk_output.block1", "trunk_output.block2"),
    "convnext_tiny": ("features.0", "features.1", "features.3"),
    "swin_t": ("features.0", "features.1", "features.3"),
    "maxvit_t": ("stem", "blocks.0.layers.0.layers.MBconv.layers.pre_norm", "blocks.0.layers.0.layers.MBconv"),
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "extractors.md"
HEAD = "| network | layer | stride | receptive field | in windows |\n| --- | --- | ---: | ---: | --- |\n"


def random_network(name: str) -> nn.Module:
    """A network in evaluation mode whose every path can be seen: BatchNorm and scales of layers aren't the identity."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of changes to come in how torchvision draws weights
        network = load_network(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("layer_scale"):
            nn.init.uniform_(parameter, 0.2, 1)
    return network


def receptive_field(extractor: LayerExtractor, layer: str) -> ReceptiveField | str:
    """A layer's receptive field, or why it has no finite one."""
    try:
        return LayerGraph(extractor, [layer]).receptive_field(layer)
    except ValueError as error:
        return str(error).partition("receptive field: ")[2]


def rows(name: str) -> list[str]:
    """The lines of the table for a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extractor = LayerExtractor(outline_network(name), LAYERS[name])
    lines = []
    for layer in LAYERS[name]:
        field, strides = receptive_field(extractor, layer), extractor.strides[layer]
        stride = "-" if strides is None else str(strides[0])
        if isinstance(field, str):
            lines.append(f"| {name} | {layer} | {stride} | - | whole images: {field.partition('; ')[0]} |")
        else:
            lines.append(f"| {name} | {layer} | {stride} | {field.size[0]} | yes |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/extractors.md, else print it")
    table = HEAD + "".join(f"{line}\n" for name in LAYERS for line in rows(name))
    if not parser.parse_args().write:
        print(table)
        return
    before, _, rest = DOCUMENT.read_text().partition(HEAD)
    after = "\n".join(line for line in rest.split("\n") if not line.startswith("| "))
    DOCUMENT.write_text(before + table + after)


if __name__ == "__main__":
    main()
