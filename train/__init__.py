"""Training: `python -m train CONFIG --workdir DIR`."""
