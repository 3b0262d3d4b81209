"""python -m ip_jax.cli"""

from ip_jax.cli import main

main()
