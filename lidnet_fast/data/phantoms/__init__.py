"""Phantom patients whose lesions are known exactly, and the studies that are made of them."""
