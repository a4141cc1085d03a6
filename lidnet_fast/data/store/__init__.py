"""The store: one compressed HU volume per series, with an index of slices and lesions (docs/store.md)."""
