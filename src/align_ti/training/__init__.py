"""The objective as one scalar, and the Hugging Face trainer that minimises it."""
