"""Why a kernel library isn't in the installed package, as its build wrote it down, and the command that builds it."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PACKAGE = Path(__file__).parent
_RECORD = "_build.json"


def why_not_built(library: str) -> str:
    """One line: the cause that `setup.py` recorded, and how to fix it.

    Args:
        library: "_C" or "_C_cuda".
    """
    try:
        record = json.loads((_PACKAGE / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {}
    entry = record.get(library, {"cause": "nothing was built in this checkout", "fix": ""})
    first = f"{entry['fix']}; then: " if entry["fix"] else ""
    return f"{library} isn't built: {entry['cause']}. To fix: {first}{rebuild_command()}"


def rebuild_command() -> str:
    """The pip command that builds the libraries against this environment's torch, from where the package is from."""
    if (_PACKAGE.parent / "setup.py").is_file():
        return f"pip install --no-build-isolation --no-deps --editable {shlex.quote(str(_PACKAGE.parent))}"
    # pip keeps wheels that it built of anything but a local folder, and would install the same one again.
    options = "--no-build-isolation --no-deps --force-reinstall --no-cache-dir"
    return f"pip install {options} {_source()}"


def _source() -> str:
    """What to give pip: the folder or repository that this was installed from (PEP 610), else the package's name."""
    try:
        installed = distribution("lidnet_fast")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    url, repository = origin.get("url", ""), origin.get("vcs_info")
    folder = Path(unquote(urlsplit(url).path))
    if repository:
        return shlex.quote(f"{repository['vcs']}+{url}@{repository['commit_id']}")
    if url.startswith("file:") and (folder / "setup.py").is_file():
        return shlex.quote(str(folder))
    return "--no-binary lidnet_fast lidnet_fast"
