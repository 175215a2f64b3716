"""Ahead-of-time compilation for TPU pods."""
