"""The terms of the objective, one a file: options, what is read of the two models, rows with weights or a scalar, and a plain twin."""
