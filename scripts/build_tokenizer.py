"""Train the shipped model's tokenizer (byte-level BPE, single digits) on the texts of this Python
installation.

python scripts/build_tokenizer.py DIRECTORY [--vocab-size 2048]
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opensala.data.facts import random_facts
from opensala.data.text import documents

CHARACTERS = 5_000_000  # of each kind


def corpus(seed: int = 0) -> list[str]:
    """Text of every kind in equal shares, with facts and questions mixed in so that their words become
    tokens."""
    rng = random.Random(seed)
    chosen = []
    for kind in ("code", "prose", "headers"):
        texts, total = list(documents(kind)), 0
        rng.shuffle(texts)
        for text in texts:
            if total > CHARACTERS:
                break
            chosen.append(text[:100_000])
            total += len(chosen[-1])
    for fact in (f for _ in range(3000) for f in random_facts(rng, 5)):
        chosen.append(f"{fact.statement}\n\nQuestion: {fact.question}\nAnswer: {fact.answer}")
    return chosen


def build(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=1 << 20,
        clean_up_tokenization_spaces=False,
    )


def main(directory: Path, vocab_size: Annotated[int, typer.Option(min=300)] = 2048) -> None:
    build(vocab_size).save_pretrained(directory)
    print(f"{directory}: tokenizer of {vocab_size} tokens")


if __name__ == "__main__":
    typer.run(main)
