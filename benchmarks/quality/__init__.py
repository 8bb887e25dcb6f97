"""The campaign of docs/quality.md: its data and its studies."""
