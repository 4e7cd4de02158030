"""What a model still does: perplexity, tasks, answers, transfer between texts."""
