"""How the model learns: python -m train CONFIG --workdir DIR."""
