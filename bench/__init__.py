"""Benchmarks: each case checks its result first, then ours and the peer are timed turn by turn in one run.

python -m bench cpu                              all of it: a table, a record and a picture in bench/results
python -m bench cpu --only decode --quick        one group of rows, fewer pairs
python -m bench gpu                              the same on a GPU
python -m bench gpu-static                       GPU kernels compiled for every target; needs no GPU
pytest bench/kernels --benchmark-only            kernels alone, every implementation that can serve the call
"""
