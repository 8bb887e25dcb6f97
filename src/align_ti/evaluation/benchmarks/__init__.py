"""The field's benchmarks, a file each: where its files are, how it asks, how it scores. Imports no torch."""
