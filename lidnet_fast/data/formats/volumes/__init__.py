"""CT volumes in files: MetaImage and NRRD (through ITK), NIfTI (through nibabel)."""
