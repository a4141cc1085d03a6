"""CT in DICOM: headers, pixels, series, and derived images."""
