"""Profiles of the fuzzing: few examples, the same every time; many with ``--hypothesis-profile long``."""

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

settings.register_profile("short", max_examples=150, derandomize=True, print_blob=False, **_COMMON)
settings.register_profile("long", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5000")), print_blob=True, **_COMMON)
settings.load_profile("short")
