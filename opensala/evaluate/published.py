"""Scores published in the MiniCPM-SALA paper (arXiv 2602.11761), for the tables that stand beside ours."""

MODELS = ("Qwen3-8B", "Nemotron-Nano-v2-9B", "Ministral-3-R-8B", "Falcon-H1R-7B", "MiniCPM-SALA-9B")

# Table 3: suite and length -> one score for each of MODELS
LONG: dict[str, dict[int, tuple[float, ...]]] = {
    "ruler": {65536: (80.53, 88.77, 70.66, 56.50, 92.65), 131072: (71.74, 68.01, 45.09, 36.33, 89.37)},
    "mrcr_2needle": {65536: (29.20, 20.91, 44.02, 13.18, 29.77), 131072: (26.50, 14.61, 50.30, 9.17, 28.62)},
    "mrcr_4needle": {65536: (21.56, 13.69, 35.80, 9.06, 20.57), 131072: (14.75, 12.20, 22.66, 8.22, 19.62)},
    "mrcr_8needle": {65536: (17.82, 13.24, 17.23, 6.93, 16.56), 131072: (12.15, 7.55, 14.47, 7.54, 10.12)},
    "nolima": {
        32000: (43.40, 19.69, 3.78, 14.89, 54.54),
        64000: (23.35, 11.82, 2.48, 9.87, 42.95),
        128000: (11.25, 5.80, 3.48, 4.73, 23.86),
    },
}

# Table 4: RULER beyond 128K; None where the paper has no figure
ULTRA_LENGTHS = (131072, 524288, 1_000_000, 2 * 2**20)
ULTRA: dict[str, tuple[float | None, ...]] = {
    "Qwen3-30B-A3B-Instruct-2507": (89.1, 78.4, 72.8, None),
    "Qwen3-235B-A22B-Instruct-2507": (93.9, 90.9, 84.5, None),
    "Qwen3-Next-80B-A3B-Instruct": (96.0, 86.9, 80.3, None),
    "MiniCPM-SALA-9B": (89.4, 87.1, 86.3, 81.6),
}

# Table 2: standard benchmarks, one score for each of STANDARD_MODELS
STANDARD_MODELS = (
    "Qwen3-8B",
    "Nemotron-Nano-v2-9B",
    "MiniCPM-4.1-8B",
    "Ministral-3-R-8B",
    "Falcon-H1R-7B",
    "MiniCPM-SALA-9B",
)
STANDARD: dict[str, tuple[float, ...]] = {
    "CMMLU": (81.68, 61.59, 84.72, 71.74, 63.55, 81.55),
    "MMLU-Pro": (73.26, 71.79, 72.70, 68.75, 70.98, 67.04),
    "HumanEval": (93.90, 93.90, 91.46, 96.95, 96.34, 95.12),
    "LCB-v5": (56.89, 68.26, 56.89, 65.87, 67.66, 60.48),
    "LCB-v6": (48.57, 60.00, 51.43, 53.71, 57.71, 52.00),
    "MBPP": (81.32, 93.39, 91.05, 94.16, 91.05, 89.11),
    "AIME24": (73.33, 71.67, 80.83, 81.46, 86.67, 83.75),
    "AIME25": (66.67, 56.67, 72.08, 75.00, 81.04, 78.33),
    "BBH": (74.17, 74.28, 82.68, 64.39, 63.17, 81.55),
    "IFEval": (84.66, 86.69, 77.45, 70.06, 86.32, 76.34),
    "Average": (73.45, 73.82, 76.13, 74.21, 76.45, 76.53),
}
