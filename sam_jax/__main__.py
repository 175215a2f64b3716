"""`python -m sam_jax` runs `sam-jax`."""

import sys

from sam_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
