"""CT volumes in files that SimpleITK reads: MetaImage, NRRD and NIfTI."""
