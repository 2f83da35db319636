"""`opensala bench speed`: MiniCPM-SALA beside a dense Transformer of the same sizes, in transformers and
llama.cpp.

Figures 2 and 3 of arXiv 2602.11761 for any machine: time to first token, end to end, milliseconds per token,
memory. Every contender is a process of its own (`worker`); they take turns piece by piece (`run`).
"""
