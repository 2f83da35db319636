"""Training by recipes: stages, data, steps, checkpoints, many processes (parallel). Nothing here is imported
by the engine.

`recipes` says what is done, `pipeline` does it, `trainer` runs one stage, `steps` takes one step.
"""
