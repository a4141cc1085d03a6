"""The command line: `lidnet-fast COMMAND`, one function per command, in modules by what the command is for."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lidnet_fast.cli.comparing import compare, demo
from lidnet_fast.cli.data import export, prepare
from lidnet_fast.cli.judging import assess, evaluate
from lidnet_fast.cli.training import bench, train
from lidnet_fast.cli.use import denoise, detect, info, publish
from lidnet_fast.errors import InputError
from lidnet_fast.strangers_text import printable

USAGE = """usage: lidnet-fast COMMAND [OPTIONS]

commands:
  demo       train LIDnet and its controls on phantoms, and write a report
  prepare    turn CT (DICOM, .mhd, .nrrd, .nii, ...) and lesion boxes into a store to train on
  train      train detector, denoiser and both together on a store
  compare    train with several objectives, denoisers and seeds, and judge them alike
  bench      measure how fast a configuration trains here, and what limits it
  evaluate   score a finished run, or images that any tool denoised, on the held-out patients
  assess     noise, resolution, detectability, and lesions that vanish or appear, of any denoisers
  export     write a store's held-out low-dose images for other tools to denoise
  denoise    denoise CT studies with a trained model: DICOM in, DICOM out
  detect     find lesions in CT studies with a trained model: tables, JSON and DICOM SR
  publish    write a trained model as a folder for model hubs: safetensors, ONNX, a model card
  info       what is installed and which implementations are used

lidnet-fast COMMAND --help says more.
"""

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "compare": compare,
    "bench": bench,
    "evaluate": evaluate,
    "assess": assess,
    "export": export,
    "denoise": denoise,
    "detect": detect,
    "publish": publish,
    "info": info,
}

_SAFE_PATH = "PYTHONSAFEPATH"

# System errors that a user can fix.
_OF_THE_SYSTEM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOTDIR,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


@contextmanager
def _ended_by_sigterm_as_by_ctrl_c() -> Iterator[None]:
    """Batch systems end jobs with SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # None is a handler that wasn't set in Python, which can't put it back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _run(command: str, arguments: Sequence[str]) -> None:
    """Run a command, and write what it prints before Python ends, where an error would be a traceback."""
    before = os.environ.get(_SAFE_PATH)
    # Processes that a command starts would look for every module in the working directory first.
    os.environ[_SAFE_PATH] = "1"
    try:
        with _ended_by_sigterm_as_by_ctrl_c():
            COMMANDS[command](arguments)
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
        sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what the user can fix ends as one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        import lidnet_fast

        print(lidnet_fast.__version__)
        return
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise InputError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")
        if command != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"{command} runs in one process; only train runs under torchrun")
        _run(command, rest)
    except InputError as error:
        print(f"lidnet-fast: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again when it ends
        sys.exit(141)  # as shells report the end by SIGPIPE
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"lidnet-fast: {printable(place)}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lidnet-fast: interrupted; the same command resumes from what is finished", file=sys.stderr)
        sys.exit(130)
