"""Derives seeds, so that no state of a generator is carried along."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on every part and on their order, on any machine.

    Every use of random numbers gets a seed of its own from its purpose (the run's seed, the epoch,
    the rollout, ...). So nothing depends on how many numbers were drawn before, and resuming a run
    needs no stored state of a generator.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)  # what torch and NumPy accept
