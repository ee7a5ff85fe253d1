"""Kernels in Triton that the plugins for CUDA, ROCm and XPU share.

Only a device plugin imports this package: Triton is no dependency of the kit. Nothing here knows a card by its name;
what a kernel may use follows from the limits that the driver reports (limits.py).
"""
