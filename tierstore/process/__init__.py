"""What happens to the process around the store: interrupts, forks and worker threads."""
