"""Models that answer questions: prompts, texts that are too long, and a task asked of a model."""
