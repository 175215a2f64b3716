"""Kernels for TPUs, in Pallas; each stands for plain products, which tests hold it to."""
