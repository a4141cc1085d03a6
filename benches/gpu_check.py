"""Parity, determinism, capture and speed of the ROI perceptual loss on a GPU. Run by gpu_check.sh; writes one JSON."""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boxes as box_sets
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from lidnet_fast import backend, roi_perceptual_loss
from lidnet_fast.files import write_text
from lidnet_fast.reference.roi_perceptual import box_losses
from lidnet_fast.runtime import machine_facts

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
ROUNDS, WARM_UP = 30, 5
STRIDE = 4


def features(images: int, channels: int, side: int, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(images, channels, side, side, device="cuda").to(dtype).contiguous(memory_format=form) for _ in "ab"
    ]


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
        expected = box_losses(wide, target.double(), boxes.double(), (7, 7), 1 / STRIDE, 2, True, "mse")
        (expected_gradient,) = torch.autograd.grad(expected, wide, upstream)
        errors = {
            "losses": relative_error(losses, expected.detach()),
            "gradient": relative_error(gradient, expected_gradient),
        }
        ok = max(errors.values()) < TOLERANCES[dtype]
        results[f"{dtype}{' channels_last' if channels_last else ''}"] = {**errors, "ok": ok}
    return results


def behaviour() -> dict[str, bool]:
    input, target = features(2, 64, 64, torch.float32, False)
    boxes = box_sets.as_rois(box_sets.proposals((256, 256), 2, 64)).cuda()
    expected = with_gradient(ours, input, target, boxes)
    again = with_gradient(ours, input, target, boxes)
    results = {"repeats bitwise": all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))}

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradient(ours, input, target, boxes)
        results["never synchronises"] = True
    except RuntimeError:
        results["never synchronises"] = False
    finally:
        torch.cuda.set_sync_debug_mode("default")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = with_gradient(ours, input, target, boxes)
    stream.synchronize()
    results["other stream"] = all(torch.equal(a, b) for a, b in zip(expected, on_stream, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradient(ours, input, target, boxes)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    results["CUDA graph"] = all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))

    if torch.cuda.device_count() > 1:
        other = with_gradient(ours, *(x.to("cuda:1") for x in (input, target, boxes)))
        results["second device"] = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, other, strict=True))
    return results


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no CUDA device here")
    backend.use("fused")
    torch.manual_seed(0)
    report = {"machine": machine_facts(), "parity": parity(), "behaviour": behaviour()}
    failed = [name for name, result in report["parity"].items() if not result["ok"]]
    failed += [name for name, ok in report["behaviour"].items() if not ok]
    if not failed:  # what isn't right isn't timed
        report["speed"] = speed()
    write_text(out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    if failed:
        sys.exit(f"gpu_check: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
