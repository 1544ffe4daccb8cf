"""GPU kernels, one folder an architecture, written in CuTe DSL and run as ahead-of-time shared objects.

A kernel module holds ``build(config)``; :mod:`dsv4_compile.ops.kernels.cache` turns it into a callable. Only kernel
modules import cutlass, and only when one of them has to be compiled.
"""
