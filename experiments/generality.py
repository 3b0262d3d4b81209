"""Does a general prompt suffice on-policy? The same as `ip-jax run generality`."""

from ip_jax.cli import script

if __name__ == "__main__":
    script("generality")
