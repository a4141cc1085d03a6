"""Task-based assessment of denoisers: noise, resolution, detectability, and lesions that vanish or appear."""
