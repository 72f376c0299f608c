"""The front door and the memory: one asyncio process, no torch. See ARCHITECTURE.md."""
