"""The recipe, and what each ablation changes in it.

The first were run around a first recipe, before saliency of tokens and a spread of 4 were found to be better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variant:
    """Steps are counted from the first: warm until `warm`, then `ramp` steps to the target, final at `stage_one`."""

    task: str = "reviews"
    share: float = 0.5
    steps: int = 250
    batch: int = 32
    lr: float = 2e-3
    second_rate: float | None = None  # a number: two constant rates; None: linear to zero
    again: float | None = None  # stage two begins with this share of the rate, and is linear to zero from there
    warmup: int = 14
    warm: int = 98
    ramp: int = 32
    stage_one: int = 162
    start: str = "saliency"  # or "flat", which knows no warm steps
    by: str = "cost"  # saliency over a group's cost; "kind": over the mean of its kind
    spread: float = 2.0
    temperature: float = 1.0
    mask_lr: float = 5e-2
    mask_optimizer: str = "adam"
    learn: bool = True
    noise: str = "gumbel"  # or "none", "hard concrete"
    noise_off: int = 10_000  # from this step on without noise
    budget: str = "threshold"  # or "lagrangian"
    distil_logits: float = 0.0
    distil_hidden: float = 0.0
    teacher: str = "warm"  # as it was when the warm steps ended; "self": the same weights, masks all on
    allocation: str = "learned"  # "random inside": as many channels of each layer, drawn at random
    biases: bool = False  # trained too
    rule: str | None = None  # uniform masks by this criterion before the first step
    balanced: bool = False  # saliency, the same fraction of every mask, when the warm steps end
    saliency: str = "steps"  # squares of the mask gradients of "steps", "samples" or "tokens"
    regather: float = 0.0  # decay of a saliency that is gathered to the end of stage one
    average: int = 0  # what is trained is averaged over so many of the last steps
    means: bool = False  # a channel that is off stands at its mean for the layers that read it


BASE = Variant()
RECIPE = replace(BASE, saliency="tokens", spread=4.0)
TWO_RATES = {"lr": 5e-4, "second_rate": 1e-4}
AT_ONCE = {"learn": False, "noise": "none", "ramp": 0, "stage_one": 99}

VARIANTS = {
    "recipe": RECIPE,
    "first recipe": BASE,
    "nothing removed": replace(BASE, share=0.0),
    "random, uniform": replace(BASE, rule="random"),
    # around the first recipe
    "flat start, as long": replace(BASE, start="flat", ramp=130),
    "spread 1": replace(BASE, spread=1.0),
    "spread 4": replace(BASE, spread=4.0),
    "spread 8": replace(BASE, spread=8.0),
    "not learned": replace(BASE, learn=False, noise="none"),
    "not learned, at once": replace(BASE, **AT_ONCE),
    "warm 30": replace(BASE, warm=30),
    "warm 60": replace(BASE, warm=60),
    "stage two at once": replace(BASE, stage_one=132),
    "biases trained": replace(BASE, biases=True),
    "logits distilled": replace(BASE, distil_logits=1.0),
    "saliency, balanced": replace(BASE, balanced=True),
    "random inside": replace(BASE, allocation="random inside"),
    "saliency of single samples": replace(BASE, saliency="samples"),
    "saliency of single tokens": replace(BASE, saliency="tokens"),
    "single samples, not learned": replace(BASE, saliency="samples", learn=False, noise="none"),
    "single samples, logits distilled": replace(BASE, saliency="samples", distil_logits=1.0),
    # around the recipe: saliency, and learning against fixing the masks where saliency puts them
    "recipe, nothing removed": replace(RECIPE, share=0.0),
    "recipe, not learned, at once": replace(RECIPE, **AT_ONCE),
    "recipe, balanced": replace(RECIPE, balanced=True),
    "recipe, random inside": replace(RECIPE, allocation="random inside"),
    "recipe, saliency by kind": replace(RECIPE, by="kind"),
    "recipe, saliency to the end": replace(RECIPE, regather=0.9),
    "recipe, masks x 3": replace(RECIPE, mask_lr=0.15),
    "recipe, masks x 0.3": replace(RECIPE, mask_lr=0.015),
    "recipe, masks by Adam of one scale": replace(RECIPE, mask_optimizer="shared scale"),
    "recipe, masks by SGD": replace(RECIPE, mask_optimizer="sgd", mask_lr=30.0),
    # noise and budget
    "recipe, no noise": replace(RECIPE, noise="none"),
    "recipe, noise off for the last third": replace(RECIPE, noise_off=140),
    "recipe, temperature 0.5": replace(RECIPE, temperature=0.5),
    "recipe, hard concrete": replace(RECIPE, noise="hard concrete"),
    "recipe, lagrangian": replace(RECIPE, budget="lagrangian"),
    # schedule
    "recipe, warm 140": replace(RECIPE, warm=140, stage_one=200),
    "recipe, warm 170": replace(RECIPE, warm=170, stage_one=230),
    "recipe, no ramp": replace(RECIPE, ramp=1),
    "recipe, ramp 60": replace(RECIPE, ramp=60),
    "recipe, stage one to the end": replace(RECIPE, stage_one=249),
    "recipe, learning rate 1e-3": replace(RECIPE, lr=1e-3),
    "recipe, learning rate 4e-3": replace(RECIPE, lr=4e-3),
    "recipe, two rates": replace(RECIPE, **TWO_RATES),
    "recipe, rate again": replace(RECIPE, again=0.7),
    # to lose less
    "recipe, averaged": replace(RECIPE, average=50),
    "recipe, means": replace(RECIPE, means=True),
    "recipe, means, at once": replace(RECIPE, means=True, **AT_ONCE),
    "recipe, logits distilled, 0.2": replace(RECIPE, distil_logits=0.2),
    "recipe, logits distilled, from itself": replace(RECIPE, distil_logits=0.2, teacher="self"),
    "recipe, hidden states distilled": replace(RECIPE, distil_hidden=1.0),
}
SMALL = " at 17"  # 17 % removed in place of half
VARIANTS |= {
    name + SMALL: replace(v, share=0.17)
    for name, v in VARIANTS.items()
    if v.share == 0.5 and (name == "recipe" or name.startswith("recipe, "))
}
