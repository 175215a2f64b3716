"""The evaluation protocols of the paper, one a file; see `sam_jax.evaluate.protocol`."""
