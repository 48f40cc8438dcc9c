"""What is asked and what counts: definitions of tasks, their registry, and their results. No torch."""
