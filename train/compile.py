"""python -m train.compile: the former name of `python -m train.aot`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("train.aot", run_name="__main__", alter_sys=True)
