"""`lidnet-fast info`: what runs here, and what is missing for more."""

from importlib.metadata import PackageNotFoundError, version

import lidnet_fast
from lidnet_fast import backend
from lidnet_fast.runtime import machine_facts

_TRAIN_PACKAGES = ("lightning", "torchmetrics", "faster-coco-eval", "torchjd", "pydicom", "blosc2", "pillow")


def describe() -> str:
    """The lines that `lidnet-fast info` prints."""
    facts = machine_facts()
    lines = [f"lidnet_fast {lidnet_fast.__version__}"]
    lines += [f"  {name:<12} {value}" for name, value in facts.items()]
    lines.append(f"  {'torchvision':<12} {_version('torchvision')}")
    lines.append(f"  {'triton':<12} {_version('triton')}")
    lines.append(f"ops: {backend.current()} ({backend.reason()}); available: {', '.join(backend.available())}")
    lines += [f"  {device}: {missing or 'kernels ready'}" for device, missing in backend.missing_kernels().items()]
    missing = [name for name in _TRAIN_PACKAGES if _version(name) == "not installed"]
    if missing:
        lines.append(f"trainer: {', '.join(missing)} not installed; to mend it: pip install 'lidnet_fast[train]'")
    else:
        lines.append("trainer: complete")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
