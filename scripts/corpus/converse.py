"""Let an instructed model write conversations, for a conversion of it to learn from.

    python scripts/corpus/converse.py smollm2-135m packed/train/train.npy tasks --count 2048 --device cuda

Half of them are about nothing given: behind the opening of a user's turn the model writes a question itself,
and then the answer (arXiv 2406.08464). The other half show it a passage of the text (packed ids, as
`opensala convert pack` makes) with one of a few requests. Answers that do not end are dropped. They go to
tasks/conversations_LENGTH.npy and .answers.npy, rows of exactly LENGTH tokens as in tasks.py.
"""

import random
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from opensala.hub import checkpoint_folder

MARK = "\0"  # stands for the user's words while the template is taken apart
QUESTION, ANSWER = 80, 320  # tokens at most
PASSAGE = (120, 520)  # tokens of a passage, from and to
REQUESTS = (
    "Summarize the text above in two sentences.",
    "What is the text above about?",
    "List three facts that the text above states.",
    "Explain the main point of the text above in simple words.",
    "Write a title for the text above, and say why it fits.",
    "Which names or things does the text above mention? Name the most important ones.",
    "Write one question that the text above answers, and then the answer.",
    "What can a reader learn from the text above?",
)
Conversation = tuple[list[int], list[int]]  # ids of the prompt, ids of the answer with its end


def opening(tokenizer: Any) -> tuple[str, str]:
    """What a chat template puts before a user's words, and between them and the answer."""
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, found, behind = whole.partition(MARK)
    if not found:
        raise SystemExit("the chat template does not show the user's words as they are")
    return before, behind


@torch.inference_mode()
def continuations(
    model: Any, prompts: list[list[int]], end: int, tokens: int, heat: float
) -> list[list[int]]:
    """What the model writes behind each prompt, without `end`; empty where it did not end in `tokens`."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), end)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    seen = (torch.arange(longest)[None] >= longest - lengths[:, None]).long()
    written = model.generate(
        ids.to(model.device),
        attention_mask=seen.to(model.device),
        do_sample=True,
        temperature=heat,
        top_k=40,
        max_new_tokens=tokens,
        eos_token_id=end,
        pad_token_id=end,
    )[:, longest:].tolist()
    return [row[: row.index(end)] if end in row else [] for row in written]


def passages(text: np.ndarray, count: int, rng: random.Random, end: int) -> list[list[int]]:
    """Pieces of packed ids `[n]`, without ends of texts."""
    found: list[list[int]] = []
    while len(found) < count:
        size = rng.randint(*PASSAGE)
        start = rng.randrange(max(1, len(text) - size))
        piece = text[start : start + size].tolist()
        if end not in piece:
            found.append(piece)
    return found


def prompts_of(
    model: Any, tokenizer: Any, text: np.ndarray, count: int, rng: random.Random, end: int
) -> list[list[int]]:
    """Prompts in the chat format: half of them of questions that the model wrote."""
    before, behind = opening(tokenizer)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, behind))
    questions = continuations(model, [head] * (count // 2), end, QUESTION, 1.0)
    own = [head + list(q) + tail for q in dict.fromkeys(map(tuple, questions)) if len(q) >= 4]
    asked = []
    for piece in passages(text, count - count // 2, rng, tokenizer.convert_tokens_to_ids("<|endoftext|>")):
        request = f"{tokenizer.decode(piece).strip()}\n\n{rng.choice(REQUESTS)}"
        asked.append(tokenizer(before + request + behind, add_special_tokens=False)["input_ids"])
    return own + asked


def rows_of(
    conversations: list[Conversation], length: int, filler: np.ndarray, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Conversations one after the other in rows `[n, length]`, what they leave filled with text; and marks on
    the answers."""
    rows: list[tuple[list[int], list[bool]]] = [([], [])]
    for prompt, answer in conversations:
        if len(prompt) + len(answer) > length:
            continue
        if len(rows[-1][0]) + len(prompt) + len(answer) > length:
            rows.append(([], []))
        rows[-1][0].extend(prompt + answer)
        rows[-1][1].extend([False] * len(prompt) + [True] * len(answer))
    ids, marks = np.zeros((len(rows), length), np.uint16), np.zeros((len(rows), length), bool)
    for n, (tokens, answered) in enumerate(rows):
        start = rng.randrange(max(1, len(filler) - length))
        ids[n] = filler[start : start + length]
        ids[n, : len(tokens)], marks[n, : len(tokens)] = tokens, answered
    return ids, marks


def main(
    model: Annotated[str, typer.Argument(help="An instructed model with a chat template.")],
    texts: Annotated[Path, typer.Argument(help="Packed ids of its tokenizer (.npy).")],
    output: Annotated[Path, typer.Argument(help="Folder of the rows.")],
    count: Annotated[int, typer.Option(min=2, help="Conversations to begin.")] = 2048,
    length: Annotated[int, typer.Option(min=256, help="Tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Conversations written at once.")] = 1024,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    folder = checkpoint_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    writer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    torch.manual_seed(seed)
    rng, end = random.Random(seed), tokenizer.eos_token_id
    text = np.load(texts, mmap_mode="r")
    if len(text) < length:
        raise SystemExit(f"{texts} has {len(text):,} tokens, a row of {length:,} needs as many")
    prompts = prompts_of(writer, tokenizer, text, count, rng, end)
    prompts.sort(key=len)  # those of a batch are alike
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        answers += continuations(writer, prompts[start : start + batch], end, ANSWER, 0.7)
        print(f"{len(answers)} of {len(prompts)} conversations", file=sys.stderr)
    pairs = [(p, [*a, end]) for p, a in zip(prompts, answers, strict=True) if a]
    if not pairs:
        raise SystemExit("no answer came to an end: ask for more conversations, or of another model")
    rng.shuffle(pairs)
    ids, marks = rows_of(pairs, length, text, rng)
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / f"conversations_{length}.npy", ids)
    np.save(output / f"conversations_{length}.answers.npy", marks)
    print(
        f"{len(pairs)} conversations in {len(ids)} rows of {length} tokens, {int(marks.sum()):,} of answers",
        file=sys.stderr,
    )


if __name__ == "__main__":
    typer.run(main)
