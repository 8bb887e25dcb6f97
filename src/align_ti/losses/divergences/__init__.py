"""Divergences between the teacher's and the student's next-token distribution, one a file."""
