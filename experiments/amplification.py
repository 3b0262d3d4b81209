"""Can the link between prompt and hack be amplified? The same as `ip-jax run amplification`."""

from ip_jax.cli import script

if __name__ == "__main__":
    script("amplification")
