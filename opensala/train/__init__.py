"""Training: losses so far. Builds on the model; nothing here is imported by the engine."""
