"""Seeds of any size for generators that take 32 bits."""

import hashlib


def seed_32(seed: int) -> int:
    """A seed below 2³² as it is, a larger one hashed to 32 bits; raises ValueError for a negative one."""
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(seed.to_bytes((seed.bit_length() + 7) // 8, "little")).digest()[:4], "little")
