"""Parity, determinism, capture and speed of the kernels on a GPU: one part of gpu_check.py each, as JSON in a file."""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boxes as box_sets
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import vgg19
from torchvision.ops import roi_align

from lidnet_fast import (
    ROIPerceptualLoss,
    backend,
    combine_gradients,
    gradient_gramian,
    multi_loss,
    multi_loss_jacobian,
    reference,
    roi_perceptual_loss,
)
from lidnet_fast.files import write_text
from lidnet_fast.losses import PreparedBoxes
from lidnet_fast.runtime import machine_facts

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
ROUNDS, WARM_UP = 30, 5
STRIDE = 4
PIXEL_TERMS = {"l1": 0.5, "mse": 1.0, "charbonnier": 0.3, "ssim": 0.4, "edge": 0.2, "tv": 0.1}


def features(images: int, channels: int, side: int, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(images, channels, side, side, device="cuda").to(dtype).contiguous(memory_format=form) for _ in "ab"
    ]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    target = torch.rand(shape, device="cuda", dtype=torch.float64)
    return [(target + 0.1 * torch.randn_like(target)).to(dtype), target.to(dtype)]


def ours(input: Tensor, target: Tensor, boxes: Tensor) -> Tensor:
    return roi_perceptual_loss(input, target, boxes, 7, 1 / STRIDE)


def torchvision(input: Tensor, target: Tensor, boxes: Tensor) -> Tensor:
    pooled = [roi_align(x.float(), boxes, 7, 1 / STRIDE, 2, True) for x in (input, target)]
    return F.mse_loss(*pooled)


def with_gradient(loss: Callable[..., Tensor], input: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    leaf = input.detach().requires_grad_()
    value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def parity() -> dict[str, Any]:
    results = {}
    for dtype, channels_last in itertools.product(TOLERANCES, (False, True)):
        input, target = features(2, 70, 64, dtype, channels_last)
        boxes = box_sets.as_rois(box_sets.proposals((256, 256), 2, 64)).cuda()
        upstream = torch.randn(len(boxes), device="cuda", dtype=torch.float64)
        leaf = input.detach().requires_grad_()
        losses = roi_perceptual_loss(leaf, target, boxes, 7, 1 / STRIDE, reduction="none")
        (gradient,) = torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))
        wide = input.double().requires_grad_()
        pooling = (boxes.double(), None, [1 / STRIDE], (7, 7), 2, True)
        expected = reference.roi_perceptual_loss([wide], [target.double()], *pooling, "mse")
        (expected_gradient,) = torch.autograd.grad(expected, wide, upstream)
        errors = {
            "losses": relative_error(losses, expected.detach()),
            "gradient": relative_error(gradient, expected_gradient),
        }
        ok = max(errors.values()) < TOLERANCES[dtype]
        results[f"{dtype}{' channels_last' if channels_last else ''}"] = {**errors, "ok": ok}
    return results


def pixel_parity() -> dict[str, Any]:
    """multi_loss, its jacobian and the gradients' algebra against their definitions in float64."""
    results = {}
    shapes = {"images": (2, 2, 175, 203), "volumes": (2, 1, 14, 33, 45)}
    for dtype, (name, shape) in itertools.product(TOLERANCES, shapes.items()):
        weights = PIXEL_TERMS if name == "volumes" else {**PIXEL_TERMS, "ms_ssim": 0.7}
        input, target = images(*shape, dtype=dtype)
        total, gradient = with_gradient(lambda x, y: multi_loss(x, y, weights).total, input, target)  # noqa: B023
        terms, options, wide = list(weights), (None, 1.0, 1.0), target.double()
        arguments = (terms, list(weights.values()), *options)
        expected = with_gradient(lambda x, y: reference.multi_loss(x, y, *arguments)[0], input.double(), wide)  # noqa: B023
        rows = multi_loss_jacobian(input, target, list(weights))
        exact_rows = reference.multi_loss_jacobian(input.double(), wide, terms, *options)
        flat = rows.double().flatten(1)
        coefficients = torch.arange(1.0, len(weights) + 1, device="cuda", dtype=rows.dtype)
        combined = combine_gradients(rows, coefficients)
        errors = {
            "total": relative_error(total, expected[0]),
            "gradient": relative_error(gradient, expected[1]),
            "jacobian": relative_error(rows, exact_rows),
            "gramian": relative_error(gradient_gramian(rows), flat @ flat.T),
            "combined": relative_error(combined, torch.tensordot(coefficients.double(), rows.double(), 1)),
        }
        results[f"{name}, {dtype}"] = {**errors, "ok": max(errors.values()) < TOLERANCES[dtype]}
    return results


def window_parity() -> dict[str, Any]:
    """Losses on windows against those of whole images."""
    results = {}
    boxes = [of_image.cuda() for of_image in box_sets.lidc_slices(4)]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-2)):
        pair = images(4, 1, 512, 512, dtype=dtype)
        losses = window_losses("relu2_2", dtype)
        expected = with_gradient(lambda x, y: losses["whole image"](x, y, boxes), *pair)  # noqa: B023
        for name in ("ours", "ours, compiled"):
            actual = with_gradient(lambda x, y: losses[name](x, y, boxes), *pair)  # noqa: B023
            errors = [relative_error(*values) for values in zip(actual, expected, strict=True)]
            results[f"ROI windows, {name}, vgg19 relu2_2, {dtype}"] = {"errors": errors, "ok": max(errors) <= tolerance}
    return results


def window_losses(layer: str, dtype: torch.dtype) -> dict[str, ROIPerceptualLoss]:
    """A loss on windows, also compiled (CUDA graphs), and the same one on whole images."""
    torch.manual_seed(0)
    network = vgg19()
    losses = {
        "ours": ROIPerceptualLoss(network, layer),
        "ours, compiled": ROIPerceptualLoss(network, layer, compiled=True),
        "whole image": ROIPerceptualLoss(network, layer, "whole"),
    }
    return {name: loss.to("cuda", dtype) for name, loss in losses.items()}


def behaviour(step: Callable[..., tuple[Tensor, ...]], arguments: list[Tensor]) -> dict[str, bool]:
    """What must hold of a step whatever it computes."""

    def same(actual: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, actual, strict=True))

    expected = step(*arguments)
    results = {"repeats bitwise": same(step(*arguments))}

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
        results["never synchronises"] = True
    except RuntimeError:
        results["never synchronises"] = False
    finally:
        torch.cuda.set_sync_debug_mode("default")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step(*arguments)
    stream.synchronize()
    results["other stream"] = same(on_stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    results["CUDA graph"] = same(captured)

    if torch.cuda.device_count() > 1:
        results["second device"] = same(step(*(x.to("cuda:1") for x in arguments)))
    return results


def behaviours() -> dict[str, bool]:
    boxes = box_sets.as_rois(box_sets.proposals((256, 256), 2, 64)).cuda()
    weights = {**PIXEL_TERMS, "ms_ssim": 0.7}

    def roi_step(input: Tensor, target: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        return with_gradient(ours, input, target, boxes)

    def pixel_step(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        rows = multi_loss_jacobian(input, target, list(weights))
        pixel = with_gradient(lambda x, y: multi_loss(x, y, weights).total, input, target)
        return (*pixel, rows, gradient_gramian(rows), combine_gradients(rows, rows.new_ones(len(rows))))

    steps = {
        "ROI perceptual": behaviour(roi_step, [*features(2, 64, 64, torch.float32, False), boxes]),
        "pixel losses": behaviour(pixel_step, list(images(2, 1, 181, 203))),
    }
    results = {f"{name}: {what}": ok for name, results in steps.items() for what, ok in results.items()}
    results |= {f"ROI windows: one CUDA graph, halo {halo}": window_capture(halo) for halo in ("exact", "whole")}
    return results | {"at most 7 launches": 0 < launches(boxes) <= 7, "bad boxes are asserted": asserts_boxes()}


def window_capture(halo: str) -> bool:
    """Whether replays of `ROIPerceptualLoss`, with boxes of another batch, give what calls with them give."""
    loss = ROIPerceptualLoss(vgg19(), "relu2_2", halo).cuda()
    batches = [images(2, 1, 256, 256) for _ in "ab"]
    boxes = [
        torch.tensor([[0.0, 100, 100, 116, 116], [1, 0, 0, 20, 20]]),
        torch.tensor([[0.0, 0, 0, 20, 20], [1, 60, 140, 76, 156]]),
    ]
    static = [x.clone() for x in batches[0]]
    prepared = loss.prepare(static[0], boxes[0])
    graph, captured = capture(loss, static, prepared)
    errors = []
    for pair, of_batch in zip(batches[::-1], boxes[::-1], strict=True):
        for place, values in zip(static, pair, strict=True):
            place.detach().copy_(values)
        prepared.replace(of_batch)
        graph.replay()
        expected = with_gradient(lambda x, y: loss(x, y, of_batch), *pair)  # noqa: B023
        errors += [relative_error(*values) for values in zip(captured, expected, strict=True)]
    return max(errors) <= 1e-5


def capture(
    loss: ROIPerceptualLoss, static: list[Tensor], prepared: PreparedBoxes
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """The loss of static images and its gradient as one CUDA graph, and where its replays put them."""
    denoised, normal_dose = static[0].requires_grad_(), static[1]

    def step() -> tuple[Tensor, Tensor]:
        value = loss(denoised, normal_dose, prepared)
        return value.detach(), torch.autograd.grad(value, denoised)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def launches(boxes: Tensor) -> int:
    """Kernels that a ROI perceptual loss and its gradient launch."""
    input, target = features(2, 64, 64, torch.float32, False)
    input.requires_grad_()
    roi_perceptual_loss(input, target, boxes.float(), spatial_scale=0.25).backward()
    input.grad = None
    with torch.profiler.profile() as profile:
        roi_perceptual_loss(input, target, boxes.float(), spatial_scale=0.25).backward()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)


def asserts_boxes() -> bool:
    """Whether a box of NaN ends a process, whose CUDA is of no use from then on, with a message."""
    program = """if True:
        import torch
        from lidnet_fast import roi_perceptual_loss
        features = torch.zeros(1, 4, 8, 8, device="cuda")
        roi_perceptual_loss(features, features, torch.tensor([[0, 1, torch.nan, 2, 2]], device="cuda"))
        torch.cuda.synchronize()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.returncode != 0 and "boxes must have finite coordinates" in done.stdout + done.stderr


def median_ms(run: Callable[[int], Any]) -> float:
    times = []
    for turn in range(WARM_UP + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run(turn)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def rotate(loss: Callable[..., Tensor], pairs: list[list[Tensor]], boxes: Tensor) -> Callable[[int], Any]:
    return lambda turn: with_gradient(loss, *pairs[turn % len(pairs)], boxes)


def speed() -> dict[str, Any]:
    """Medians in ms, forward and backward, over inputs that rotate through more memory than the L2 cache holds."""
    results = {}
    contestants = {"ours": ours, "torchvision": torchvision, "compiled": torch.compile(torchvision)}
    for count, dtype, channels_last in itertools.product((256, 1000), (torch.float32, torch.bfloat16), (False, True)):
        pairs = [features(4, 256, 128, dtype, channels_last) for _ in range(4)]
        boxes = box_sets.as_rois(box_sets.proposals((512, 512), 4, count)).cuda()
        row = {name: median_ms(rotate(loss, pairs, boxes)) for name, loss in contestants.items()}
        row["times as fast as torchvision"] = row["torchvision"] / row["ours"]
        results[f"4x256x128x128, {count} proposals, {dtype}{' channels_last' if channels_last else ''}"] = row
    return results


def pixel_speed() -> dict[str, Any]:
    """Medians in ms, forward and backward, against the definition eager and compiled."""
    results = {}

    def definition(input: Tensor, target: Tensor) -> Tensor:
        return reference.multi_loss(input, target, list(PIXEL_TERMS), list(PIXEL_TERMS.values()), None, 1.0, 1.0)[0]

    contestants = {
        "ours": lambda x, y: multi_loss(x, y, PIXEL_TERMS).total,
        "definition": definition,
        "compiled": torch.compile(definition),
    }
    for shape in ((4, 1, 512, 512), (1, 1, 512, 512), (16, 1, 64, 64), (1, 1, 64, 256, 256)):
        pairs = [images(*shape) for _ in range(max(1, (100 << 20) // (8 * math.prod(shape))))]
        row = {
            name: median_ms(lambda turn, loss=loss: with_gradient(loss, *pairs[turn % len(pairs)]))  # noqa: B023
            for name, loss in contestants.items()
        }
        results["x".join(map(str, shape))] = row | {"times as fast as compiled": row["compiled"] / row["ours"]}
    return results


def window_speed() -> dict[str, Any]:
    """Medians in ms, forward and backward, of losses on windows and on whole images."""
    results = {}
    boxes = box_sets.lidc_slices(4)
    for layer in ("relu2_2", "relu3_4", "relu4_4"):
        pair, losses = images(4, 1, 512, 512), window_losses(layer, torch.float32)
        row = {
            name: median_ms(lambda turn, loss=loss: with_gradient(lambda x, y: loss(x, y, boxes), *pair))  # noqa: B023
            for name, loss in losses.items()
        }
        graph, _ = capture(losses["ours"], pair, losses["ours"].prepare(pair[0], boxes))
        row["ours, one CUDA graph"] = median_ms(lambda turn: graph.replay())  # noqa: B023
        row["times as fast as whole image"] = row["whole image"] / row["ours"]
        results[f"ROI windows, vgg19 {layer}, 4x1x512x512"] = row
    return results


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "parity": lambda: parity() | pixel_parity() | window_parity(),
    "behaviour": behaviours,
    "speed-rois": speed,
    "speed-pixels": pixel_speed,
    "speed-windows": window_speed,
}


def failures(part: str, results: dict[str, Any]) -> list[str]:
    """The cases that aren't right; speed is only told."""
    if part == "parity":
        return [name for name, result in results.items() if not result["ok"]]
    return [name for name, ok in results.items() if not ok] if part == "behaviour" else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here")
    backend.use("fused")
    torch.manual_seed(0)
    # TF32's 10 bits of mantissa put the whole image's own gradient 1.6e-2 off, beyond what parity allows.
    torch.backends.cudnn.allow_tf32 = False
    results = PARTS[arguments.part]()
    write_text(arguments.out, json.dumps({"machine": machine_facts(), "results": results}, indent=1) + "\n")
    failed = failures(arguments.part, results)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
