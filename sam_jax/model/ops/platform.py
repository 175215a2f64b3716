"""Which kind of device a program is traced for, where an implementation depends on it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_traced_for: contextvars.ContextVar[str] = contextvars.ContextVar("traced_for")


def platform() -> str:
    """ "cpu", "gpu" or "tpu": as `traced_for` says, or else that of the default device.

    `jax.lax.platform_dependent` would choose later, but keeps for the backward pass what any of its
    branches would need, zeros included.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # set on import
    return _traced_for.get(getattr(device, "platform", device) or jax.default_backend())


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Within it, programs are traced for devices that need not be here."""
    token = _traced_for.set(name)
    try:
        yield
    finally:
        _traced_for.reset(token)
