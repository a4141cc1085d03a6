"""Where the ops are defined, and how they take part in autograd, forward-mode differentiation and torch.vmap.

torch.library.register_autograd knows neither tangents (it drops them) nor torch.func's transforms. So each op gets an
autograd kernel here, which is a torch.autograd.Function of one level, as PyTorch's own transforms make them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree

from lidnet_fast._tensors import in_forward_mode

library = torch.library.Library("lidnet_fast", "DEF")

# The key of the tensors that torch.autograd.grad batches; torch.vmap's have another.
_BATCHED = torch._C._dispatch_key_parse("Batched")

# What an op's derivative is given or gives for each argument: a Tensor, a list of them, or None.
Derivative = Tensor | Sequence[Tensor | None] | None


def define(schema: str) -> None:
    """Define an op that follows what torch.compile and torch.export ask of it."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def differentiate(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    tangent: Callable[..., Any],
) -> None:
    """Give an op its derivatives, and torch.vmap a loop over it.

    A derivative that is None stands for zero, in all of these functions. Lists of Tensors are lists of derivatives.

    Args:
        name: Of the op.
        save: (ctx, arguments, output), keeps what the other two need, by `keep` and as attributes of ctx.
        backward: (ctx, *upstream gradients) -> the gradient of each argument. `ctx.needs` holds for each whether it is
            needed.
        tangent: (ctx, *tangents of the arguments) -> the tangent of each output.
    """
    op = getattr(torch.ops.lidnet_fast, name).default
    returns_list = isinstance(op._schema.returns[0].type, torch.ListType)

    def forward(lengths: tuple[int | None, ...], *flat: Any) -> Any:
        arguments = _unflatten(flat, lengths)
        if torch._C._are_functorch_transforms_active():
            # A Function turns derivatives off within, but the outer transforms, which see the op next, have theirs.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
        return tuple(output) if returns_list else output

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths, *flat = inputs
        ctx.set_materialize_grads(False)
        save(ctx, _unflatten(flat, ctx.lengths), output)

    def run_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        ctx.needs = _unflatten(ctx.needs_input_grad[1:], ctx.lengths)
        of_arguments = backward(ctx, *gradients)
        flat: list[Tensor | None] = []
        for gradient, length in zip(of_arguments, ctx.lengths, strict=True):
            flat += [gradient] if length is None else [None] * length if gradient is None else gradient
        return None, *flat

    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return tangent(ctx, *_unflatten(tangents, ctx.lengths))

    methods: dict[str, Callable[..., Any]]
    methods = {"forward": forward, "setup_context": setup_context, "backward": run_backward, "jvp": jvp}
    function: Any = type(name, (_SingleLevelFunction,), {key: staticmethod(f) for key, f in methods.items()})

    def run(*arguments: Any) -> Any:
        lengths, flat = _flatten(arguments)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                output = function.apply(lengths, *flat)
        elif _may_be_differentiated(flat):
            output = function.apply(lengths, *flat)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
        return list(output) if returns_list else output

    library.impl(name, run, "Autograd")
    _loop(name)


def differentiate_by(name: str, differentiable: str) -> None:
    """Let another op, whose first result is this one's, take the place of an op wherever it may be differentiated."""
    op, other = (getattr(torch.ops.lidnet_fast, each).default for each in (name, differentiable))

    def run(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or _may_be_differentiated(_flatten(arguments)[1]):
            return other(*arguments)[0]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    library.impl(name, run, "Autograd")
    _loop(name)


def _loop(name: str) -> None:
    """Let an op run for one sample after the other under torch.vmap, and under torch.autograd.grad's batches."""
    op = getattr(torch.ops.lidnet_fast, name).default

    def run_each(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        dims = _pytree.tree_leaves(in_dims)
        result = _stack_results(op, arguments, dims, info.batch_size)
        return result, 0 if isinstance(result, Tensor) else type(result)(0 for _ in result)

    def run_each_gradient(*arguments: Any) -> Any:
        # torch.autograd.grad with is_grads_batched has a vmap of its own, whose level only its counter knows.
        level = max(torch._C._vmapmode_increment_nesting() - 1, 1)
        torch._C._vmapmode_decrement_nesting()
        leaves, structure = _pytree.tree_flatten(arguments)
        dims = [0 if _is_batched_gradient(leaf) else None for leaf in leaves]
        unwrapped = [
            leaf if dim is None else torch._remove_batch_dim(leaf, level, 1, 0)  # type: ignore[attr-defined]
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        count = max(leaf.shape[0] for leaf, dim in zip(unwrapped, dims, strict=True) if dim == 0)
        result = _stack_results(op, _pytree.tree_unflatten(unwrapped, structure), dims, count)
        return _pytree.tree_map(lambda tensor: torch._add_batch_dim(tensor, 0, level), result)  # type: ignore[attr-defined]

    library.impl(name, run_each_gradient, "Batched")
    torch.library.register_vmap(f"lidnet_fast::{name}", run_each, lib=library)


def _may_be_differentiated(arguments: Iterable[Any]) -> bool:
    if in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in arguments)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for `backward` and `tangent`, which both find them in `ctx.saved_tensors`."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def refuse_tangents(op: str, **tangents: Derivative) -> None:
    """Raise for a tangent of an argument that the op has no derivative in."""
    for name, tangent in tangents.items():
        if any(part is not None for part in (tangent if isinstance(tangent, Sequence) else (tangent,))):
            raise NotImplementedError(f"{op} has no derivative in {name}. To fix: pass {name}.detach()")


def refuse_second_derivative(remedy: str) -> None:
    """Raise for a derivative of a gradient."""
    raise NotImplementedError(f"the fused losses can't be differentiated twice. To fix: {remedy}, which can")


def _flatten(arguments: Iterable[Any]) -> tuple[tuple[int | None, ...], list[Any]]:
    """Lists of Tensors taken apart, and the length of each; None for what isn't one."""
    lengths: list[int | None] = []
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, list | tuple) and any(isinstance(part, Tensor) for part in argument):
            lengths.append(len(argument))
            flat += argument
        else:
            lengths.append(None)
            flat.append(argument)
    return tuple(lengths), flat


def _unflatten(flat: Sequence[Any], lengths: Iterable[int | None]) -> tuple[Any, ...]:
    arguments, parts = [], iter(flat)
    for length in lengths:
        arguments.append(next(parts) if length is None else [next(parts) for _ in range(length)])
    return tuple(arguments)


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.vmap, or torch.autograd.grad with is_grads_batched, batches the tensor at its outermost level."""
    return torch._C._functorch.is_batchedtensor(tensor) or _is_batched_gradient(tensor)


def _is_batched_gradient(argument: Any) -> bool:
    return isinstance(argument, Tensor) and torch._C._dispatch_keys(argument).has(_BATCHED)


def _stack_results(op: Callable[..., Any], arguments: Any, dims: Sequence[int | None], count: int) -> Any:
    """The op's results for each sample; `dims` holds for each leaf of the arguments the dimension that is batched."""
    leaves, structure = _pytree.tree_flatten(arguments)
    # As the kernels read them: contiguous.
    leaves = [
        leaf if not isinstance(leaf, Tensor) else (leaf if dim is None else leaf.movedim(dim, 0)).contiguous()
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    results = []
    for number in range(count):
        sample = [leaf if dim is None else leaf[number] for leaf, dim in zip(leaves, dims, strict=True)]
        results.append(op(*_pytree.tree_unflatten(sample, structure)))
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return type(results[0])(torch.stack(parts) for parts in zip(*results, strict=True))
