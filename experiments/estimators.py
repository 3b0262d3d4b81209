"""Which estimator is recontextualization? The same as `ip-jax run estimators`."""

from ip_jax.cli import script

if __name__ == "__main__":
    script("estimators")
