"""An alias: `python -m train.compile` is `python -m train.aot`.

It must not import JAX: `train/aot/__main__.py` sets environment variables before that.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("train.aot", run_name="__main__", alter_sys=True)
