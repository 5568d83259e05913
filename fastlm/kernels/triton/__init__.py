"""Triton kernels and their launchers. Imported only when a call may use them: triton is optional."""
