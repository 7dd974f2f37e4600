"""Measuring the machine this runs on, with a runtime's own kernels."""
