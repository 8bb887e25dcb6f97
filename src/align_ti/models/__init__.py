"""Student and teacher, and the one seam to transformers: attention interface, cache, head."""
