"""CT data: the store and its sources, chest phantoms, the LIDC lesion table and low-dose simulation."""
