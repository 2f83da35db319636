"""Tasks in lm-eval's own format over one local file, whose rows have text and question."""

_HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: FOLDER/{file}}}}}
test_split: test
"""
_QUESTION = 'doc_to_text: "{{text}}\\n\\nQuestion: {{question}}\\nAnswer:"\n'


def head(name: str, file: str) -> str:
    """Name and data; FOLDER stands for the folder of the file."""
    return _HEAD.format(name=name, file=file)


def choice_task(name: str, file: str) -> str:
    """Rows also have choices and the number of the right one, label."""
    return (
        head(name, file)
        + "output_type: multiple_choice\n"
        + _QUESTION
        + """doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    )


def answer_task(name: str, file: str, target: str, tokens: int) -> str:
    """An answer of up to so many tokens, compared with `target`, an expression over the row."""
    return (
        head(name, file)
        + "output_type: generate_until\n"
        + _QUESTION
        + f"""doc_to_target: "{{{{{target}}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {tokens}}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
