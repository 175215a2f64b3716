"""Operations with several implementations: plain JAX and kernels, chosen in `dispatch.py`."""
