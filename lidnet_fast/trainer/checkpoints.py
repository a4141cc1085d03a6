"""Checkpoints of an unfinished phase: whole or absent, without NaN, and read without running any code."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lidnet_fast.errors import InputError
from lidnet_fast.files import write_bytes
from lidnet_fast.models.files import diverged_weights, serialised


class PhaseCheckpoints(TorchCheckpointIO):
    """How Lightning writes and reads the checkpoints of a phase.

    Lightning's own way writes to the system's temporary folder and moves the file from there, which across file systems
    is a copy that can be interrupted.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint under a temporary name, then rename.

        Raises:
            InputError: the weights have diverged; the checkpoint before stays.
            OSError: it can't be written; the checkpoint before stays.
        """
        diverged = diverged_weights(checkpoint["state_dict"])
        if diverged is not None:
            raise InputError(
                f"{diverged} is NaN after step {checkpoint['global_step']}: lower the learning rate or check "
                "the data; the last checkpoint is intact"
            )
        write_bytes(Path(path), serialised(checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed, whatever the arguments say.

        Raises:
            InputError: it can't be read, or is not of a phase.
        """
        advice = "delete it to start its phase again"
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
            diverged = diverged_weights(checkpoint["state_dict"])
        except Exception as error:  # torch.load raises whatever its zip and pickle readers do
            raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}): {advice}") from error
        if diverged is not None:
            raise InputError(f"{path}: {diverged} is NaN: {advice}")
        return checkpoint
