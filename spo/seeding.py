"""Randomness is derived, not carried."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order, on any machine.

    Whatever is random gets its own seed from what it is for (the run's seed, the epoch, the
    rollout, ...) instead of drawing from one long stream of random numbers. So nothing depends on
    how much was drawn before, and resuming a run needs no stored state of a generator.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)  # what torch and NumPy accept
