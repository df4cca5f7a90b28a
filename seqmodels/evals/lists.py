"""Lists of lm-eval's tasks by the paper that reports them, each with its number of examples in the prompt (`@shots`).

Without `@` a task has as many as its own file says, or none.
"""

LISTS = {
    # The files of seqmodels/evals/tasks, which need no network.
    "local": ("endings", "cloze", "cloze_generated", "passages"),
    # Gu and Dao 2023 (arXiv 2312.00752), table 3: zero-shot.
    "mamba": ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"),
    # Dao and Gu 2024 (arXiv 2405.21060), table 10: the same and OpenBookQA.
    "mamba2": ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"),
    # Sun et al. 2023 (arXiv 2307.08621): zero-shot, and again with four examples (`hellaswag@4,...`).
    "retnet": ("hellaswag", "boolq", "copa", "piqa", "wsc273", "winogrande", "storycloze_2016"),
    # He et al. 2024 (arXiv 2403.00818) compares with RetNet; it cites these beside RetNet's.
    "densessm": (
        *("lambada_openai", "arc_easy", "arc_challenge"),
        *("hellaswag", "boolq", "copa", "piqa", "winogrande", "storycloze_2016"),
    ),
    # MixCon, table 2, the closed-book NQ of tables 3, 5 and 6, and table 4. BBH's file holds its three examples.
    "mixcon": (
        *("hellaswag@10", "winogrande@5", "arc_easy@0", "arc_challenge@25", "boolq@10", "quac@0"),
        *("mmlu@5", "bbh_cot_fewshot", "nq_open@5", "leval@3"),
    ),
}
# Every benchmark that a paper of this family reports, once.
LISTS["paper"] = (
    *("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "boolq"),
    *("quac", "mmlu@5", "bbh_cot_fewshot", "glue", "squadv2", "nq_open@5", "leval"),
)

# Reported, but not among lm-eval's tasks: a file of this name in config.evaluation.task_folder serves.
WITHOUT_FILE = ("quac", "leval")


def parse(text: str) -> list[tuple[str, int | None]]:
    """[(task, shots or None), ...] of task names and names of lists, apart by commas; each task once.

    Raises: ValueError for shots that are no number.
    """
    tasks: dict[str, int | None] = {}
    for name in filter(None, map(str.strip, text.split(","))):
        for entry in LISTS.get(name, (name,)):
            task, _, shots = entry.partition("@")
            if shots and not shots.isdecimal():
                raise ValueError(f"{entry!r}: after @ comes the number of examples in the prompt")
            tasks.setdefault(task, int(shots) if shots else None)
    return list(tasks.items())
