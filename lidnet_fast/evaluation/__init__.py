"""Trained denoisers, and images of any tool, compared on the same held-out fields of view."""
