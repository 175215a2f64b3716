"""The platform that a program is traced for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_traced_for: contextvars.ContextVar[str] = contextvars.ContextVar("traced_for")


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the one of `traced_for`, or else that of the default device.

    `jax.lax.platform_dependent` would choose later, but its backward pass keeps the residuals of
    every branch, filled with zeros for the branches that did not run.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # set on import
    return _traced_for.get(getattr(device, "platform", device) or jax.default_backend())


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Makes `platform` return `name`, so that programs can be traced for absent devices."""
    token = _traced_for.set(name)
    try:
        yield
    finally:
        _traced_for.reset(token)
