"""Benchmarks: each case checks its result first, then times ours and the peer turn by turn in one process."""
