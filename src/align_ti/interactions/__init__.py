"""The three interactions: where the instruction looks (IVA), what comes after a token (TPA), which layer shows it (IRS)."""
