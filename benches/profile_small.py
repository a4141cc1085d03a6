"""Where calls with little work spend their time: kernels, clearing the gradient, checks, autograd and Python.

    python -m benches.profile_small        half a minute on one core

Processor time of forward and backward, medians of calls in turns: first as PyTorch begins, which returns freed memory
to the system, then with memory kept as our commands do. "kernels" are the ops called without checks and autograd;
"clearing a gradient" is torch.zeros_like of the features: kernels clear theirs as well, but in memory that they keep.
The peer is torchvision's pooling twice and F.mse_loss; of the images, the usual implementations of the terms.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from benches.bench_multi_loss import SIX, usual
from benches.boxes import as_rois, lesions
from lidnet_fast import multi_loss, multiscale_roi_perceptual_loss, roi_perceptual_loss
from lidnet_fast.functional._boxes import check_boxes
from lidnet_fast.functional._pooling import level_areas
from lidnet_fast.runtime import keep_freed_memory, machine_facts

ROUNDS = 40
Step = Callable[[], object]


def of_feature_map() -> dict[str, Step]:
    features, target = torch.randn(2, 4, 256, 128, 128)
    boxes = as_rois(lesions((512, 512), 4))
    options = ([features], [target], boxes, None, [0.25], [7, 7], 2, True, "mse")
    leaf = features.clone().requires_grad_()

    def torchvision() -> Tensor:
        pooled = [roi_align(maps, boxes, 7, 0.25, 2, True) for maps in (leaf, target)]
        return torch.nn.functional.mse_loss(*pooled)

    return {
        "ours": lambda: torch.autograd.grad(roi_perceptual_loss(leaf, target, boxes, 7, 0.25), leaf),
        "kernels": lambda: kernels(options, len(boxes)),
        "clearing": lambda: torch.zeros_like(features),
        "peer": lambda: torch.autograd.grad(torchvision(), leaf),
    }


def of_pyramid() -> dict[str, Step]:
    strides, sizes = (4, 8, 16, 32, 64), [(512, 512)] * 2
    inputs, targets = ([torch.randn(2, 256, 512 // stride, 512 // stride) for stride in strides] for _ in range(2))
    boxes = lesions((512, 512), 2)
    leaves = [level.clone().requires_grad_() for level in inputs]
    names, scales = [str(stride) for stride in strides], [1 / stride for stride in strides]
    checked = check_boxes(boxes, inputs[0], scales[0], level_areas=level_areas(scales, 224.0, 4))
    options = (inputs, targets, checked.rois, checked.levels, scales, [7, 7], 2, True, "mse")
    pooler = MultiScaleRoIAlign(names, 7, 2)

    def ours() -> Tensor:
        levels = (dict(zip(names, maps, strict=True)) for maps in (leaves, targets))
        return multiscale_roi_perceptual_loss(*levels, boxes, sizes, 7, 2)

    def torchvision() -> Tensor:
        pooled = [pooler(dict(zip(names, maps, strict=True)), boxes, sizes) for maps in (leaves, targets)]
        return torch.nn.functional.mse_loss(*pooled)

    return {
        "ours": lambda: torch.autograd.grad(ours(), leaves),
        "kernels": lambda: kernels(options, len(checked.rois)),
        "clearing": lambda: [torch.zeros_like(level) for level in inputs],
        "peer": lambda: torch.autograd.grad(torchvision(), leaves, allow_unused=True),
    }


def kernels(options: tuple, boxes: int) -> None:
    inputs, _, *pooling, _ = options
    _, slopes = torch.ops.lidnet_fast.roi_perceptual_losses(*options, True)
    shapes = [side for level in inputs for side in level.shape]
    of_gradients = (shapes, [False] * len(inputs), torch.float32)
    torch.ops.lidnet_fast.roi_perceptual_losses_backward(
        torch.full((boxes,), 1 / boxes), slopes, *pooling, *of_gradients
    )


def of_images() -> dict[str, Step]:
    images, target = torch.rand(2, 16, 1, 64, 64)
    weights = dict.fromkeys(SIX, 1.0)
    options = (list(weights), list(weights.values()), None, 1.0, 1.0, True)
    leaf = images.clone().requires_grad_()
    return {
        "ours": lambda: torch.autograd.grad(multi_loss(leaf, target, weights).total, leaf),
        "kernels": lambda: torch.ops.lidnet_fast.multi_loss(images, target, *options),
        "clearing": lambda: torch.zeros_like(images),
        "peer": lambda: torch.autograd.grad(usual(weights)(leaf, target), leaf),
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()), end=".\n\n")
    print("Freed memory is returned to the system:\n")
    table()
    keep_freed_memory()
    print("\nFreed memory is kept:\n")
    table()


def table() -> None:
    print("| microseconds | ours | kernels | clearing a gradient | checks, autograd, Python | peer | times |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    cases = {
        "4x256x128x128, 40 lesions": of_feature_map(),
        "2x256 at five levels, 20 lesions": of_pyramid(),
        "16x1x64x64, six terms": of_images(),
    }
    for case, steps in cases.items():
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                start = time.process_time()
                step()
                taken[name].append(1e6 * (time.process_time() - start))
        median = {name: statistics.median(times) for name, times in taken.items()}
        ours, kernels, peer = median["ours"], median["kernels"], median["peer"]
        cells = [ours, kernels, median["clearing"], ours - kernels, peer]
        print(f"| {case} | {' | '.join(f'{cell:.0f}' for cell in cells)} | {peer / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
