"""One file per group of rows, with a function `cases()` that yields `bench.case.Case`s; see `bench.__main__`."""
