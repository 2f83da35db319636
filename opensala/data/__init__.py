"""Text sources and the synthetic long-context tasks. Knows nothing of models, training or engines."""
