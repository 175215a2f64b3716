"""Ahead-of-time compilation of programs for TPU pods that are not attached."""
