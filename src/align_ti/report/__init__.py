"""A page for people: a pure function of the run folder; imports no torch."""
