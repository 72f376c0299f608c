"""The token journal: what it remembers, its bytes, and the file on disk."""
