"""What a newcomer runs first: real prompts, a checkpoint made in seconds, and the demo."""
