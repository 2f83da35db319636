"""Training: losses, and many processes (parallel). Builds on the model; nothing here is imported by the engine."""
