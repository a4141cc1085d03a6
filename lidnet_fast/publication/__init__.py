"""Trained denoisers as folders for model hubs and other runtimes: `publish` is what `lidnet-fast publish` runs."""

from .folder import publish

__all__ = ["publish"]
