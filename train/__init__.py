"""Training: `python -m train CONFIG --workdir DIR`. It needs the extra `train`."""

import importlib.util

from sam_jax.io.extras import install_hint

PACKAGES = ("grain", "matplotlib", "optax", "orbax", "tensorboardX")  # that the code imports

if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    # With this name, `python -m train` prints one line instead of a traceback.
    raise ModuleNotFoundError(
        f"training needs {', '.join(missing)}; {install_hint('train')}", name=__name__
    )
