"""A small DeepSeek-V3-style model that is trained here: its text, its training, and its checkpoint."""
