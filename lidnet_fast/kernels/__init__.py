"""The Triton kernels of the top-level folder `kernels/`, as a checkout finds them.

Installing the package puts that folder in this one's place; a checkout on the path has only this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
