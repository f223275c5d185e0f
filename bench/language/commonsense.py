"""lm-eval's path and ours on the same items: do they choose alike?

    python -m bench.language.commonsense                         # the dense SmolLM2-135M, 200 items a task; 3 minutes
    python -m bench.language.commonsense --model /tmp/ours       # a folder that bench.language.compare --keep wrote

The items are WinoGrande's, and science questions (QASC), which lm-eval has no task for: they are written in ARC's
schema and asked as its arc_easy asks. Both go to a folder as `prunekern eval --tasks ... --local` takes it. What is
chosen must be what `tasks.ChoiceTask` finds by itself, item by item: likelihoods that tie to 1e-3 aside.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

import prunekern.hf  # noqa: F401  (compact folders load too)
from bench.common import progress, report
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.tasks.harness import evaluate_tasks
from prunekern.training.recipe import evaluate

TIE = 1e-3  # of log-likelihoods: batches of other sizes round differently


def as_hub(name: str, row: dict) -> dict:
    """An encoded-for-us row in the schema of the data set on the hub."""
    if name == "winogrande":
        rest = row["continuations"][0]
        options = [c.split() for c in row["contexts"]]
        shared = 0  # words before the blank
        while shared < min(map(len, options)) and options[0][shared] == options[1][shared]:
            shared += 1
        before = " ".join(options[0][:shared])
        named = {f"option{i + 1}": " ".join(words[shared:]) for i, words in enumerate(options)}
        return {"sentence": f"{before} _{rest}".lstrip(), **named, "answer": str(row["label"] + 1)}
    question = row["contexts"][0].removeprefix("Question: ").removesuffix("\nAnswer:")
    letters = [chr(ord("A") + i) for i in range(len(row["continuations"]))]
    choices = {"text": [c.strip() for c in row["continuations"]], "label": letters}
    return {"question": question, "choices": choices, "answerKey": letters[row["label"]]}


ASKED_AS = {"winogrande": ("winogrande", "validation"), "science": ("arc_easy", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, or the demo model")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="commonsense")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = demo_model(args.model) if args.model == "smollm2-135m" else Path(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ours, rows = {}, []
    with tempfile.TemporaryDirectory() as local:
        for name, (asked, split) in ASKED_AS.items():
            ours[name] = task = tasks.get(name).take(test=args.items)
            (Path(local) / asked).mkdir()
            lines = [json.dumps(as_hub(name, row)) + "\n" for row in task.splits["test"]]
            (Path(local) / asked / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        model = tasks.get("winogrande").model_class().from_pretrained(folder).eval()
        names = [asked for asked, _ in ASKED_AS.values()]
        progress.say("lm-eval asks")
        with torch.inference_mode():
            found = evaluate_tasks(model, tokenizer, names, local)
    for name, task in ours.items():
        progress.say(f"ChoiceTask asks {name}")
        metrics, scores = evaluate(model, tokenizer, task)
        theirs = torch.tensor(found["tasks"][ASKED_AS[name][0]]["chosen"])
        own = scores.argmax(1)
        close = scores.gather(1, own.unsqueeze(1)) - scores.gather(1, theirs.unsqueeze(1)) < TIE
        if not bool(close.all()):
            raise SystemExit(f"{name}: lm-eval chose otherwise on {int((~close).sum())} of {len(own)} items")
        rows.append(
            {
                "items": task.name,
                "asked_as": ASKED_AS[name][0],
                "count": len(own),
                "lm_eval_acc_%": round(100 * found["tasks"][ASKED_AS[name][0]]["acc"], 2),
                "ours_%": round(100 * metrics["accuracy"], 2),
                "chosen_alike": int((own == theirs).sum()),
            }
        )
    report.table(f"{folder.name}: lm-eval {found['lm_eval']} and ChoiceTask on the same items", rows)
    report.write(args.out, model=folder.name, lm_eval=found["lm_eval"], rows=rows)


if __name__ == "__main__":
    main()
