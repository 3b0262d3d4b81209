"""GCD approval, in reinforcement. The same as `ip-jax run gcd_approval`."""

from ip_jax.cli import script

if __name__ == "__main__":
    script("gcd_approval")
