"""Do likelihood gates help recontextualization?

The same as `ip-jax run gated_recontextualization`.
"""

from ip_jax.cli import script

if __name__ == "__main__":
    script("gated_recontextualization")
