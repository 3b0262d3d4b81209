"""Inoculation prompting in JAX: prompts, training steps, sampling and evaluation of what a training
prompt keeps out of a model.
"""

__version__ = "0.1.0"
