"""Several processes: loader workers, and ranks of which one has no boxes. Each set of processes examines all cases."""

import tempfile
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from .cases import CASES, Case
from .cells import assert_near, cell, run, upstream_of, with_gradient


class Results(Dataset):
    """Value and gradient of each case, computed where the item is asked for."""

    def __init__(self, names: Sequence[str], used: Sequence[nn.Module | None]) -> None:
        self.names = names
        self.used = used

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[str, Tensor | None, Tensor | None]:
        case = next(case for case in CASES if case.name == self.names[number])
        try:
            module = self.used[number]
            function = case.build() if module is None else lambda *tensors: case.call(module, *tensors)
            value, gradient = run(function, *case.tensors())
        except Exception:
            return traceback.format_exc(), None, None
        return "", value.detach(), gradient


def in_a_worker(cases: Sequence[Case], context: str) -> list[str]:
    """Errors of the cases in a loader's worker, after this process has used them on more than one thread."""
    torch.set_num_threads(2)
    modules = [None if case.module is None else case.module() for case in cases]
    for case, module in zip(cases, modules, strict=True):
        run(case.build() if module is None else lambda *tensors, c=case, m=module: c.call(m, *tensors), *case.tensors())
    results = Results([case.name for case in cases], modules)
    loader = DataLoader(results, batch_size=None, num_workers=1, multiprocessing_context=context, timeout=60)
    errors = []
    for case, (error, value, gradient) in zip(cases, loader, strict=True):
        x, t, b = case.tensors()
        right, right_gradient = run(case.expected, x.double(), t, b)
        if not error:
            error = difference(value, right) or (difference(gradient, right_gradient) if case.differentiable else "")
        errors.append(error)
    return errors


def difference(value: Tensor, right: Tensor) -> str:
    try:
        assert_near(value, right, torch.float32)
    except AssertionError as error:
        return str(error)
    return ""


@cell("DataLoader workers, forked", together=True)
def _(cases: Sequence[Case]) -> list[str]:
    """Value and gradient after the parent has used two threads."""
    return in_a_worker(cases, "fork")


@cell("DataLoader workers, spawned", together=True)
def _(cases: Sequence[Case]) -> list[str]:
    """Value and gradient, the module sent to the worker after use."""
    return in_a_worker(cases, "spawn")


class Scaled(nn.Module):
    """A parameter below the case, and the case's module with it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(case.shape[1:]))
        self.function = case.build()

    def forward(self, x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return self.function(x * self.scale, t, b)


def of_rank(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What each of two ranks is given: the second has no boxes."""
    return case.tensors(boxes=4 - 4 * rank, seed=rank)


def as_rank(rank: int, cases: Sequence[Case], store: str, errors: Sequence[multiprocessing.SimpleQueue]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    found = []
    for case in cases:
        try:
            model = DistributedDataParallel(Scaled(case))
            for _ in range(2):  # a rank that doesn't take part hangs, or fails, in the next step
                model.zero_grad()
                value = model(*of_rank(case, rank))
                value.backward(upstream_of(value))
            right = 0.0
            for other in range(2):
                x, t, b = of_rank(case, other)
                scale = torch.ones(case.shape[1:], dtype=torch.float64, requires_grad=True)
                of_other = case.expected(x * scale, t, b)
                right = right + torch.autograd.grad(of_other, scale, upstream_of(of_other))[0] / 2
            found.append(difference(model.module.scale.grad, right))
        except Exception:
            found.append(traceback.format_exc())
    errors[rank].put(found)
    torch.distributed.destroy_process_group()


@cell("DistributedDataParallel, a rank without boxes", with_gradient, together=True)
def _(cases: Sequence[Case]) -> list[str]:
    """The mean of both ranks' gradients, in two steps."""
    context = multiprocessing.get_context("fork")
    errors = [context.SimpleQueue() for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=as_rank, args=(rank, cases, f"{folder}/store", errors), daemon=True)
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
    assert all(process.exitcode == 0 for process in ranks), f"ranks ended with {[p.exitcode for p in ranks]}"
    return ["\n".join(filter(None, of_case)) for of_case in zip(*(queue.get() for queue in errors), strict=True)]
