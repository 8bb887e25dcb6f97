"""Rows in, one value per row out; imports nothing else of Align-TI."""
