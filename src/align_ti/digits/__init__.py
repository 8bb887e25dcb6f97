"""The built-in benchmark: questions about scenes of real handwritten digits.

`scans -> scenes -> questions -> files` makes the data; `models` builds the tiny LLaVA pair; `pretraining` makes the parts
that are shipped in `assets`.
"""
