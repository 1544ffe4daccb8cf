"""Host side of the GPU kernels: chooses a configuration, allocates, launches. Imports no cutlass."""
