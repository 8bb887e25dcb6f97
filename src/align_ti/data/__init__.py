"""record -> typed conversation -> tokens with roles -> batch."""
