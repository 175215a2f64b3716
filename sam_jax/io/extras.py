"""Hints on how to install the packages of an extra."""


def install_hint(extra: str) -> str:
    """Returns the commands that install the package with an extra.

    Args:
      extra: Its name, or several names separated by commas.
    """
    return (
        f"install the extra {extra}: pip install -e '.[{extra}]' in a checkout, otherwise "
        f"pip install 'sam_jax[{extra}]'"
    )
