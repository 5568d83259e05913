"""The native CPU kernels as seen from Python: one file per op, taking tensors and passing addresses to `_native`."""
