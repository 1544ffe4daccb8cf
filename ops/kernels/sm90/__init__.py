"""Kernels for Hopper (H100, H200), compiled for sm_90a."""
