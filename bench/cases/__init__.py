"""One file per case. A case is a generator of `Row`s; see `bench.case`."""
