"""The run on a GPU, step by step: ceilings, tests, kernels, the whole model, a million tokens.

`scripts/gpu.py` (`make gpu`) starts it and looks after it; `--rehearse` runs the same at tiny sizes in
Triton's interpreter on a CPU. Only `device` knows which of the two it is.
"""
