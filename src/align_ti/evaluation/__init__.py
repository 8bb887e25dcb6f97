"""Questions -> answers -> scores; imports nothing of training."""
