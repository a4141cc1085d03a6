"""Denoisers as ONNX: HU in, HU out, images of any number and size, on any runtime."""

import importlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lidnet_fast import __version__
from lidnet_fast.errors import InputError
from lidnet_fast.models.denoisers import evaluated
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.footprint import Reach
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.registry import first_line
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.neighbours import stacks_of_channels

OPSET = 18
"""Version of ONNX's operators: the oldest that PyTorch's exporter writes without converting."""
TOLERANCE_HU = 0.05
"""How far ONNX Runtime may differ from PyTorch."""

_FORMAT, _VERSION = "lidnet_fast-onnx", 1
_KEY = "lidnet_fast"
"""Under which the model's metadata have what is known of the denoiser, as JSON."""
_INPUT, _OUTPUT = "hu", "denoised_hu"
_AXES = {0: "N", 2: "H", 3: "W"}
_TRACED = ((2, 67, 77), (2, 64, 96))
"""The first that the network takes is traced: multiples of nothing show how it pads."""
_CHECKED = ((1, 96, 128), (3, 71, 58), (1, 64, 64))


class OnnxDenoiser(HUDenoiser):
    """A denoiser that ONNX Runtime computes, in float32 on the CPU, with as many threads as PyTorch.

    Args:
        path: a file that `lidnet-fast publish` made.

    Raises:
        InputError: there is none, or it is another kind of model; or ONNX Runtime isn't installed.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"there is no model {path}")
        network = _Session(path)
        known = _Known.read(path, network.session.get_modelmeta().custom_metadata_map)
        if network.slices != 2 * known.context + 1:
            seen = 2 * known.context + 1
            raise InputError(
                f"{path}: its metadata say that it sees slices: {seen}, but its input has {network.slices}"
            )
        super().__init__(network, known.window, known.envelope, known.context)
        self._known = known

    def denoise(self, hu: Tensor) -> Tensor:
        """As `HUDenoiser.denoise`, of slices [N,C,H,W] as `HUWindow.denoise`, whose work is part of the graph."""
        return self.network(stacks_of_channels(hu, self.context)).view(len(hu), -1, *hu.shape[2:])

    def bytes_per_pixel(self) -> int:
        """As `HUDenoiser.bytes_per_pixel`, measured when the file was made."""
        return self._known.bytes_per_pixel

    def reach(self) -> Reach | None:
        """As `HUDenoiser.reach`, found when the file was made."""
        return self._known.reach


class _Session(nn.Module):
    """ONNX Runtime's session as a module, HU -> HU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        runtime = _required("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, too
        try:
            self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # one class for each of its status codes
            raise InputError(f"{path}: is no model that ONNX Runtime can run: {first_line(error)}"[:300]) from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        slices, denoised = ([_slices(one) for one in values] for values in (inputs, outputs))
        if not (len(slices) == 1 and slices[0] % 2 == 1 and denoised == [1]):
            raise InputError(
                f"{path}: takes {_words(inputs)} and gives {_words(outputs)}; a denoiser takes float [N, 1, H, W], or "
                "an odd number of neighbouring slices, and gives [N, 1, H, W], of any N, H and W"
            )
        self._input, self.slices = inputs[0].name, slices[0]

    def forward(self, hu: Tensor) -> Tensor:
        images = hu.detach().float().numpy(force=True)
        try:
            (denoised,) = self.session.run(None, {self._input: images})
        except Exception as error:
            raise ValueError(first_line(error)) from error
        expected = (len(images), 1, *images.shape[2:])
        if denoised.shape != expected:
            raise ValueError(f"the model must return {list(expected)}, got {list(denoised.shape)}")
        return torch.from_numpy(denoised).to(hu.device)


def _slices(value: Any) -> int:
    """How many slices an input or output float [N, slices, H, W] with free sizes has; 0 where it is something else."""
    fixed = [place for place, axis in enumerate(value.shape) if isinstance(axis, int)]
    is_images = value.type == "tensor(float)" and len(value.shape) == 4 and fixed == [1]
    return int(value.shape[1]) if is_images else 0


def _words(values: list[Any]) -> str:
    return ", ".join(f"{one.name} {one.type} [{', '.join(map(str, one.shape))}]" for one in values)


class _Known:
    """What a file says of its denoiser beside the graph."""

    def __init__(
        self,
        window: HUWindow,
        envelope: Envelope | None,
        bytes_per_pixel: int,
        reach: Reach | None,
        context: int,
    ) -> None:
        self.window, self.envelope, self.bytes_per_pixel, self.reach = window, envelope, bytes_per_pixel, reach
        self.context = context

    @classmethod
    def of(cls, denoiser: HUDenoiser) -> Self:
        return cls(denoiser.window, denoiser.envelope, denoiser.bytes_per_pixel(), denoiser.reach(), denoiser.context)

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "software": __version__,
                "window": asdict(self.window),
                "envelope": None if self.envelope is None else self.envelope.to_dict(),
                "bytes_per_pixel": self.bytes_per_pixel,
                "reach": None if self.reach is None else asdict(self.reach),
                "context": self.context,
            }
        )

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, str]) -> Self:
        """Of a file's metadata.

        Raises:
            InputError: they are missing or aren't ours.
        """
        if _KEY not in metadata:
            raise InputError(
                f"{path}: its metadata don't say that it takes HU and in which window it works. "
                "To fix: give a model.onnx that `lidnet-fast publish` made"
            )
        try:
            content = json.loads(metadata[_KEY])
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {content['format']} version {content['version']}")
            envelope, reach = content["envelope"], content["reach"]
            return cls(
                HUWindow(float(content["window"]["low"]), float(content["window"]["high"])),
                None if envelope is None else Envelope.from_dict(envelope),
                max(1, int(content["bytes_per_pixel"])),
                None if reach is None else Reach(**{name: int(value) for name, value in reach.items()}),
                int(content.get("context", 0)),  # files of before there was a context
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: its metadata can't be read: {first_line(error)}"[:300]) from error


def write_onnx(path: Path, denoiser: HUDenoiser) -> None:
    """Write a denoiser as ONNX, once ONNX Runtime gives what PyTorch gives, also at sizes that weren't traced.

    Args:
        path: the file to make.
        denoiser: any network that PyTorch's exporter can translate; on the CPU.

    Raises:
        InputError: it can't, naming the operator that ONNX lacks, or the results differ by more than `TOLERANCE_HU`;
            or ONNX isn't installed.
    """
    onnx = _required("onnx")
    _required("onnxscript")
    with evaluated(denoiser), torch.no_grad():
        examples = [images for shape in _TRACED if (images := _taken(denoiser, shape)) is not None]
        if not examples:
            shapes = [list(_of_slices(denoiser, shape)) for shape in _TRACED]
            raise InputError(f"the denoiser takes neither of the shapes {', '.join(map(str, shapes))}")
        model = _translated(denoiser, examples[0])
        onnx.helper.set_model_props(model, {_KEY: _Known.of(denoiser).to_json()})
        onnx.save(model, path)
        made = OnnxDenoiser(path)
        for shape in _CHECKED:
            images = _taken(denoiser, shape)
            if images is not None:
                _check_same(denoiser, made, images)


def _of_slices(denoiser: HUDenoiser, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(N, H, W) with as many slices as the denoiser sees."""
    return shape[0], 2 * denoiser.context + 1, *shape[1:]


def _taken(denoiser: HUDenoiser, shape: tuple[int, int, int]) -> Tensor | None:
    """Images (N, H, W) of a shape, from air to beyond metal, if the network takes them."""
    images = torch.rand(_of_slices(denoiser, shape), generator=torch.Generator().manual_seed(0)) * 4000 - 2000
    try:
        denoiser.denoise(images)
    except Exception:  # whatever a user's network raises
        return None
    return images


def _check_same(denoiser: HUDenoiser, made: OnnxDenoiser, images: Tensor) -> None:
    try:
        difference = (made.denoise(images) - denoiser.denoise(images)).abs().max().item()
    except ValueError as error:
        raise InputError(f"the denoiser's ONNX fails on {list(images.shape)}: {first_line(error)}"[:300]) from error
    if not difference <= TOLERANCE_HU:
        raise InputError(
            f"the denoiser can't become ONNX: on {list(images.shape)} ONNX Runtime differs from PyTorch by "
            f"{difference:.3g} HU, more than {TOLERANCE_HU}"
        )


class _Plain(nn.Module):
    """The denoiser without the checks of its argument."""

    def __init__(self, denoiser: HUDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, hu: Tensor) -> Tensor:
        return self.denoiser.denoise(hu)


def _translated(denoiser: HUDenoiser, example: Tensor) -> Any:
    """The model as PyTorch's exporter writes it, an `onnx.ModelProto`, without the paths of sources that it notes."""
    try:
        with _quiet():
            program = torch.onnx.export(
                _Plain(denoiser).eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamic_shapes=(_AXES,),
                verbose=False,
            )
    except Exception as error:  # whatever the exporter and a user's network raise
        raise InputError(f"the denoiser can't become ONNX: {_cause(error)}") from error
    assert program is not None
    model = program.model_proto
    for place in (model, model.graph, *model.functions):
        del place.metadata_props[:]
        place.doc_string = ""
        for node in getattr(place, "node", ()):
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    return model


def _cause(error: BaseException) -> str:
    """What an error of the exporter says: the operator, where ONNX lacks one."""
    text = str(error)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
    if operator is not None:
        return f"its operator {operator[1]} has no counterpart in ONNX"
    summary = text.rpartition("Exception summary")[2].strip("# \n") or text
    return summary.splitlines()[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's advice and its listings of graphs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _required(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{name} is not installed: pip install 'lidnet_fast[onnx]'") from error
