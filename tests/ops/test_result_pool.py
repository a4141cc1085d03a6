"""Memory of large results on the CPU, which the next results of their size get."""

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lidnet_fast import backend, multi_loss, roi_align, roi_perceptual_loss

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch allocates results there"),
    pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="PyTorch allocates results"),
    pytest.mark.skipif("fused" not in backend.available(), reason="the C++ extension is not built"),
]

BOXES = [torch.tensor([[8.0, 8.0, 120.0, 90.0], [30.0, 200.0, 90.0, 250.0]])]
SHAPES = {"planar": (1, 64, 128, 128), "channels_last": (1, 80, 128, 128)}


def perceptual(images: Tensor) -> Tensor:
    return roi_perceptual_loss(images, torch.zeros_like(images), BOXES, 7, 1 / 4)


def aligned(images: Tensor) -> Tensor:
    return roi_align(images, BOXES, 7, 1 / 4).square().sum()


def pixels(images: Tensor) -> Tensor:
    return multi_loss(images[:, :1].repeat(1, 1, 8, 8), torch.zeros(1, 1, 1024, 1024), {"mse": 1.0, "ssim": 1.0}).total


def gradient(loss: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.autograd.grad(loss(images), images)[0]


def images_of(form: str, seed: int) -> Tensor:
    images = torch.randn(SHAPES[form], generator=torch.Generator().manual_seed(seed))
    if form == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    return images.requires_grad_()


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("loss", [perceptual, aligned])
def test_a_result_lives_in_memory_of_its_own_until_it_is_gone(loss, form):
    images, others = images_of(form, 0), images_of(form, 1)
    first = gradient(loss, images)
    copy, place = first.clone(), first.data_ptr()
    other = gradient(loss, others)
    assert other.data_ptr() != place
    assert torch.equal(first, copy)
    assert first.stride() == images.stride()
    assert first.device == torch.device("cpu")
    del first
    again = gradient(loss, images)
    assert again.data_ptr() == place  # what the other left behind isn't seen:
    assert torch.equal(again, copy)


def test_a_view_keeps_the_memory():
    first = gradient(perceptual, images_of("planar", 0))
    view, place = first[0, 3], first.data_ptr()
    copy = view.clone()
    del first
    other = gradient(perceptual, images_of("planar", 1))
    assert other.data_ptr() != place
    assert torch.equal(view, copy)


def test_results_may_go_to_shared_memory():
    result = gradient(perceptual, images_of("planar", 0))
    copy = result.clone()
    assert torch.equal(result.share_memory_(), copy)


RESIZES = {
    "resize_": lambda result: result.resize_(2, *result.shape[1:]),
    "resize_ of the storage": lambda result: result.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("resize", RESIZES.values(), ids=RESIZES)
def test_results_take_no_other_size_as_docs_performance_says(resize):
    result = gradient(perceptual, images_of("planar", 0))
    copy = result.clone()
    with pytest.raises(RuntimeError, match="not resizable"):
        resize(result)
    resize(copy)


@pytest.mark.parametrize("loss", [perceptual, aligned, pixels])
def test_threads_get_results_of_their_own(loss):
    images = [images_of("planar", seed) for seed in range(4)]
    expected = [gradient(loss, each).clone() for each in images]
    wrong = []

    def work(number: int) -> None:
        for _ in range(5):
            if not torch.equal(gradient(loss, images[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_a_new_process(program: str) -> int:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_users_step_asks_for_no_fresh_pages():
    """As a program that knows nothing of allocators meets it."""
    faults = in_a_new_process("""
import resource, torch
from lidnet_fast import roi_perceptual_loss
features, target = torch.rand(2, 4, 64, 128, 128)
features.requires_grad_()
boxes = [torch.tensor([[8.0, 8.0, 120.0, 90.0]])] * 4
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    roi_perceptual_loss(features, target, boxes, 7, 1 / 4).backward()
    features.grad = None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted(step() for _ in range(9))[4])
""")
    assert faults < 5


def test_what_is_kept_is_bounded():
    kept = in_a_new_process("""
import resource, torch
from lidnet_fast import roi_perceptual_loss
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
def gradient(side):
    features = torch.rand(1, 64, side, 256).requires_grad_()
    boxes = [torch.tensor([[8.0, 8.0, 120.0, 90.0]])]
    loss = roi_perceptual_loss(features, torch.rand(1, 64, side, 256), boxes, 7, 1 / 4)
    return torch.autograd.grad(loss, features)[0]
gradient(256)
before = resident()
many = [gradient(256 + 8 * n) for n in range(32)]
assert resident() - before > 500, resident() - before
del many
print(resident() - before)
""")
    assert kept < 256 + 100


@pytest.mark.slow
def test_a_process_forked_while_another_thread_uses_the_pool_waits_for_nobody():
    """Where it waited for the pool's mutex, one of 280 forks hung."""
    hung = in_a_new_process("""
import os, threading, time, torch
from lidnet_fast import roi_perceptual_loss
torch.set_num_threads(1)
boxes = [torch.tensor([[8.0, 8.0, 120.0, 90.0]])]
def gradient(channels):
    features = torch.ones(1, channels, 256, 256).requires_grad_()
    loss = roi_perceptual_loss(features, torch.zeros(1, channels, 256, 256), boxes, 7, 1 / 4)
    return torch.autograd.grad(loss, features)[0]
gradient(32)  # what is imported at the first call is imported, since a fork would wait for another thread's import, too
forks_to_come = True
def make_more_than_is_kept():
    while forks_to_come:
        [gradient(channels) for channels in (320, 330, 340)]
maker = threading.Thread(target=make_more_than_is_kept)
maker.start()
hung = 0
for _ in range(300):
    child = os.fork()
    if not child:
        gradient(32)
        os._exit(0)
    until = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < until:
        time.sleep(0.002)
    if not ended:
        hung += 1
        os.kill(child, 9)
        os.waitpid(child, 0)
forks_to_come = False
maker.join()
print(hung)
""")
    assert not hung
