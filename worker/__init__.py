"""One process per device: the leader schedules, every rank runs the plans. See ARCHITECTURE.md."""
