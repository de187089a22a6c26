"""lm-evaluation-harness on local files of minimal pairs, with the blimp tasks' own template."""

import json
from pathlib import Path


def lm_eval_scores(lm, files, folder):
    """What lm-eval finds with its model `lm`: file's stem -> ([good, bad] scores a pair, accuracy)."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    template = Path(lm_eval.__file__).parent / "tasks/blimp/_template_yaml"
    for file in files:
        task = {
            "include": str(template),
            "task": f"local_{file.stem}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"train": str(file)}, "cache_dir": str(folder)},
        }
        (folder / f"{file.stem}.yaml").write_text(json.dumps(task))
    evaluated = lm_eval.simple_evaluate(
        model=lm,
        tasks=[f"local_{file.stem}" for file in files],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    found = {}
    for file in files:
        samples = evaluated["samples"][f"local_{file.stem}"]
        scores = [
            [score for ((score, _),) in sample["resps"]]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        found[file.stem] = scores, evaluated["results"][f"local_{file.stem}"]["acc,none"]
    return found
