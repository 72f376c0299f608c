"""A replica's life: launch, epoch, fence. The sans-IO core, its events, the health rule, and the shell."""
