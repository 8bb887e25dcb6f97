"""Speed, memory and settings, measured: one command each, JSON out."""
