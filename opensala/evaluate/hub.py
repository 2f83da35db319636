"""Official data files: a local path as it is, or fetched from the hub into its client's cache."""

from pathlib import Path

SOURCES = {  # data set on the hub, and the files that are needed
    "mrcr": ("openai/mrcr", ("*.parquet", "*.jsonl")),
    "nolima": ("amodaresi/NoLiMa", ("needlesets/*.json", "haystack/rand_shuffle/*.txt")),
    "livecodebench": ("livecodebench/code_generation_lite", ("test5.jsonl", "test6.jsonl")),
}
SUITES = ("ruler", *SOURCES)


def data_path(suite: str, where: str) -> Path:
    """Where a suite's files are: `where` is a path, `hub`, or `hub:OWNER/NAME` for another data set of that
    form.

    Raises:
        ValueError: no such suite or path; files that the hub does not give, or that cannot be reached.
    """
    if suite not in SUITES:
        raise ValueError(f"--data: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    if where.split(":")[0] == "hub":
        return _fetched(suite, where.partition(":")[2])
    if not Path(where).exists():
        raise ValueError(
            f"--data {suite}: {where} does not "
            f"exist{f'; give a path, or hub to fetch {SOURCES[suite][0]}' if suite in SOURCES else ''}"
        )
    return Path(where)


def _fetched(suite: str, name: str) -> Path:
    if suite not in SOURCES:
        raise ValueError(
            f"--data {suite}: its files are made by RULER's own scripts and are not on the hub; give "
            "their folder, or leave "
            "--data away to have them made here"
        )
    from huggingface_hub import snapshot_download

    usual, patterns = SOURCES[suite]
    name = name or usual
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--data {suite}: {name} could not be fetched from the hub "
            f"({' '.join(str(error).split())[:200]}). Download it where "
            f"there is a network (hf download {name} --repo-type dataset) and give the folder: --data "
            f"{suite}=PATH"
        ) from error
    if not any(found for pattern in patterns for found in folder.rglob(pattern.split("/")[-1])):
        raise ValueError(f"--data {suite}: {name} holds none of {', '.join(patterns)}")
    return folder
