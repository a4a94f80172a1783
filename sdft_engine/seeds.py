"""Noise without state."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any parts, so that noise depends on (seed, step, row) and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
