"""How many examples the fuzzers take: their own number, or that of `pytest --fuzz-examples N`."""

import os

from hypothesis import HealthCheck, settings

VARIABLE = "FL_FUZZ_EXAMPLES"  # of the environment, which the workers of pytest-xdist inherit


def fuzz(default: int) -> settings:
    """The settings of a fuzzer that takes `default` examples unless the command line says otherwise.

    A seed that is new in every run finds more in the long run than one; a failure prints what repeats it.
    """
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=int(os.environ.get(VARIABLE, default)), deadline=None, print_blob=True, suppress_health_check=slow
    )
