"""Chest-like phantoms with the sizes and places of real nodules, and the study that the demo makes of them."""
