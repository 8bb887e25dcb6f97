"""What the command line and Python both call: check, distil, evaluate, score layers, summarise."""
