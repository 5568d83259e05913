"""GPU kernels judged without a GPU: compiled for every target, disassembled, held against published rates."""
