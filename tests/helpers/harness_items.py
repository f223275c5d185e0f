"""Items of lm-eval's commonsense tasks, what each asks, and a decoder and a tokenizer to ask."""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_decoders import build

CHARACTERS = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *" .,:?'\n"])}
CONTEXT = 256  # tokens the tiny model takes

# Items in the schema of the data sets on the hub; ours, not theirs.
BOOLQ = [
    ["is ice colder than fire", "Ice is frozen water. Fire is hot.", 1],
    ["do whales lay eggs", "Whales are mammals, and bear live young.", 0],
    ["can a stone swim", "A stone is denser than water.", 0],
    ["is the sea salty", "Rivers carry salt into the sea.", 1],
]
PIQA = [
    ["dry a wet shoe", "Fill it with paper and wait.", "Fill it with water.", 0],
    ["open a jar", "Freeze it.", "Run hot water over the lid, then twist.", 1],
    ["slice bread", "Use a spoon.", "Use a knife with teeth.", 1],
]
HELLASWAG = [  # and what lm-eval leaves of the marks of wikiHow: the question, the endings
    [
        "Clearing a car", "A man stands by a car.", "he", "2",
        ["eats the snow.", "flies off.", "scrapes the ice off the glass.", "sleeps."],
        "Clearing a car: A man stands by a car. He",
        ["eats the snow.", "flies off.", "scrapes the ice off the glass.", "sleeps."],
    ],
    [
        "Home", "[header] How to paint a wall [title] Clean it. [step] Use soap.", "", "0",
        ["[substeps] Let it dry.", "Paint the soap  on.", "Wall [title] Break it.", "Go."],
        "Home: How to paint a wall. Clean it. Use soap.",
        [" Let it dry.", "Paint the soap on.", "Wall. Break it.", "Go."],
    ],
    [
        "Juggling", "A girl holds three balls. She throws one up.", "the ball", "3",
        ["turns green.", "is a cat.", "sings a long song about the sea.", "comes down."],
        "Juggling: A girl holds three balls. She throws one up. The ball",
        ["turns green.", "is a cat.", "sings a long song about the sea.", "comes down."],
    ],
]  # fmt: skip
WINOGRANDE = [
    ["The cup did not fit in the box, as the _ was too big.", "cup", "box", "1"],
    ["Ann paid Eve, because _ had lent her money.", "Ann", "Eve", "2"],
    ["The dog feared the cat, for the _ was fierce.", "dog", "cat", "2"],
    ["Tom, not Sam, was ill, so _ stayed in bed.", "Tom", "Sam", "1"],
]
ARC_EASY = [
    ["Which is a star?", ["The sun", "The moon", "The earth", "A comet"], "ABCD", "A"],
    ["What do plants take in?", ["Iron", "Light", "Noise"], "ABC", "B"],
    ["Which is a metal?", ["Oak", "Sand", "Wool", "Copper"], "1234", "4"],
]
ARC_CHALLENGE = [
    ["What makes tides?", ["Wind", "The pull of the moon and the sun", "Fish", "Salt", "Ice"], "ABCDE", "B"],
    ["What melts first?", ["Butter in a pan", "Steel", "Glass", "Stone"], "1234", "1"],
    ["Which is oldest?", ["A day", "A tree", "A hill of granite", "A nest"], "ABCD", "C"],
]
OPENBOOKQA = [
    ["A bird builds a nest to", ["swim", "hold its eggs", "burn", "hide from its own shadow"], "ABCD", "B"],
    ["Rust forms when iron meets", ["air and water", "gold", "light", "song"], "ABCD", "A"],
    ["A magnet draws", ["wood", "paper", "a nail of iron", "milk"], "ABCD", "C"],
]


def arc(prefix, question, texts, labels, answer):
    return {"id": "x", prefix: question, "choices": {"text": texts, "label": list(labels)}, "answerKey": answer}


RECORDS = {
    "boolq": [{"question": q, "passage": p, "idx": i, "label": y} for i, (q, p, y) in enumerate(BOOLQ)],
    "piqa": [{"goal": g, "sol1": a, "sol2": b, "label": y} for g, a, b, y in PIQA],
    "hellaswag": [
        {"ind": 4, "activity_label": a, "ctx_a": c, "ctx_b": d, "ctx": f"{c} {d}", "endings": e, "source_id": "x",
         "split": "val", "split_type": "indomain", "label": y}
        for a, c, d, y, e, *_ in HELLASWAG
    ],
    "winogrande": [{"sentence": s, "option1": a, "option2": b, "answer": y} for s, a, b, y in WINOGRANDE],
    "arc_easy": [arc("question", *item) for item in ARC_EASY],
    "arc_challenge": [arc("question", *item) for item in ARC_CHALLENGE],
    "openbookqa": [arc("question_stem", *item) for item in OPENBOOKQA],
}  # fmt: skip
SPLITS = dict.fromkeys(RECORDS, "validation") | dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), "test")


def by_hand(name, i):
    """(context and continuation of every choice, choices, index of the right one) of an item, as the papers ask it."""
    if name == "boolq":
        question, passage, right = BOOLQ[i]
        context, choices = f"{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"]
    elif name == "piqa":
        goal, *choices, right = PIQA[i]
        context = f"Question: {goal}\nAnswer:"
    elif name == "hellaswag":
        right, context, choices = int(HELLASWAG[i][3]), *HELLASWAG[i][5:]
    elif name == "winogrande":
        sentence, *choices, answer = WINOGRANDE[i]
        before, after = sentence.split("_")  # the choices differ in the context, what follows them is scored
        return [(before + choice, after) for choice in choices], choices, int(answer) - 1
    else:
        items = {"arc_easy": ARC_EASY, "arc_challenge": ARC_CHALLENGE, "openbookqa": OPENBOOKQA}
        question, choices, labels, answer = items[name][i]
        context, right = question if name == "openbookqa" else f"Question: {question}\nAnswer:", labels.index(answer)
    return [(context, f" {choice}") for choice in choices], choices, right


def write(folder, name, records, split=None):
    (folder / name).mkdir(exist_ok=True)
    file = folder / name / f"{split or SPLITS[name]}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def character_tokenizer():
    """A token a character, after a first one, as LLaMA's has; without one for padding."""
    raw = Tokenizer(models.WordLevel(CHARACTERS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def decoder(family="llama", **changes):
    return build(family, **{"vocab_size": len(CHARACTERS), "max_position_embeddings": CONTEXT} | changes)
