"""Counter-based seeds: every random draw is named by what it is for, so nothing depends on what was drawn before."""

import hashlib


def counter_seed(run_seed: int, *counters: int | str) -> int:
    """A 63-bit seed that depends on nothing but its arguments.

        seed = first 63 bits of BLAKE2b("run_seed/counter/counter/...")

    A run that is killed and resumed asks for the same counters and draws the same numbers; no state is saved.

    Args:
        run_seed: the seed of the whole run.
        counters: what the draw is for, coarse to fine: purpose, step or rollout index, rank.
    """
    name = "/".join(str(part) for part in (run_seed, *counters))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
