"""Runs (or resumes) the figure of gated recontextualization on the toy, then draws it: the same as
`ip-jax run gated_recontextualization`.
"""

import functools
import sys

from configs.gated_recontextualization import FIGURE
from experiments import _toy

NAME, shared_part = FIGURE.name, FIGURE.shared_part
run, redraw, draw = functools.partial(_toy.run, FIGURE), _toy.redraw, _toy.draw

if __name__ == "__main__":
    from ip_jax.cli import main

    main(["run", NAME, *sys.argv[1:]])
