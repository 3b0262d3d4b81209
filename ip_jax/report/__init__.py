"""Tables and figures, drawn from an experiment's transcripts and config alone: no model, no jax."""
