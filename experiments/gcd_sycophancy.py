"""The GCD sycophancy figure. The same as `ip-jax run gcd_sycophancy`."""

from ip_jax.cli import script

if __name__ == "__main__":
    script("gcd_sycophancy")
