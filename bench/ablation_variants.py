"""The recipe, and what each ablation changes in it.

Most were run around a first recipe, before saliency of tokens and a spread of 4 were found to be better.
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
    # start
    "flat start, as long": replace(BASE, start="flat", ramp=130),
    "flat start, short ramp": replace(BASE, start="flat", ramp=32),
    "saliency by kind": replace(BASE, by="kind"),
    "spread 1": replace(BASE, spread=1.0),
    "spread 4": replace(BASE, spread=4.0),
    "spread 8": replace(BASE, spread=8.0),
    # learning against fixing the masks where saliency puts them
    "not learned": replace(BASE, learn=False, noise="none"),
    "not learned, at once": replace(BASE, learn=False, noise="none", ramp=0, stage_one=99),
    "not learned, noise": replace(BASE, learn=False),
    "masks x 3": replace(BASE, mask_lr=0.15),
    "masks x 0.3": replace(BASE, mask_lr=0.015),
    "masks by Adam of one scale": replace(BASE, mask_optimizer="shared scale"),
    "masks by Adam of one scale, x 3": replace(BASE, mask_optimizer="shared scale", mask_lr=0.15),
    "masks by SGD": replace(BASE, mask_optimizer="sgd", mask_lr=30.0),
    # noise
    "no noise": replace(BASE, noise="none"),
    "noise off for the last third": replace(BASE, noise_off=140),
    "temperature 0.5": replace(BASE, temperature=0.5),
    "hard concrete": replace(BASE, noise="hard concrete"),
    # budget
    "lagrangian": replace(BASE, budget="lagrangian"),
    # schedule
    "warm 30": replace(BASE, warm=30),
    "warm 60": replace(BASE, warm=60),
    "warm 140": replace(BASE, warm=140, stage_one=200),
    "warm 140, spread 4": replace(BASE, warm=140, stage_one=200, spread=4.0),
    "no ramp": replace(BASE, ramp=1),
    "ramp 60": replace(BASE, ramp=60),
    "stage one to the end": replace(BASE, stage_one=249),
    "stage two at once": replace(BASE, stage_one=132),
    "learning rate 1e-3": replace(BASE, lr=1e-3),
    "learning rate 4e-3": replace(BASE, lr=4e-3),
    "two rates": replace(BASE, **TWO_RATES),
    "two rates, warm 30": replace(BASE, **TWO_RATES, warm=30, ramp=60, stage_one=150),
    # more to train, more to learn from
    "biases trained": replace(BASE, biases=True),
    "logits distilled": replace(BASE, distil_logits=1.0),
    "logits distilled, 0.2": replace(BASE, distil_logits=0.2),
    "hidden states distilled": replace(BASE, distil_hidden=1.0),
    "logits distilled, from itself": replace(BASE, distil_logits=0.2, teacher="self"),
    # saliency itself
    "saliency, balanced": replace(BASE, balanced=True),
    "saliency of single samples": replace(BASE, saliency="samples"),
    "saliency of single tokens": replace(BASE, saliency="tokens"),
    "single samples, not learned": replace(BASE, saliency="samples", learn=False, noise="none"),
    "single samples, logits distilled": replace(BASE, saliency="samples", distil_logits=1.0),
    "single samples, one scale": replace(BASE, saliency="samples", mask_optimizer="shared scale"),
    "single samples, warm 60": replace(BASE, saliency="samples", warm=60),
    "single samples, balanced": replace(BASE, saliency="samples", balanced=True),
    "recipe, not learned, at once": replace(RECIPE, **AT_ONCE),
    "recipe, balanced": replace(RECIPE, balanced=True),
    "recipe, random inside": replace(RECIPE, allocation="random inside"),
    "recipe, warm 140": replace(RECIPE, warm=140, stage_one=200),
    "saliency to the end, not learned": replace(BASE, regather=0.9, learn=False),
    "saliency to the end": replace(BASE, regather=0.9),
    "saliency to the end, early": replace(BASE, regather=0.95, warm=50, ramp=90),
    # allocation
    "random inside": replace(BASE, allocation="random inside"),
    # to lose less
    "recipe, nothing removed": replace(RECIPE, share=0.0),
    "recipe, nothing removed, averaged": replace(RECIPE, share=0.0, average=50),
    "recipe, no noise": replace(RECIPE, noise="none"),
    "recipe, rate again": replace(RECIPE, again=0.7),
    "recipe, averaged": replace(RECIPE, average=50),
    "recipe, rate again, averaged": replace(RECIPE, again=0.7, average=50),
    "recipe, means": replace(RECIPE, means=True),
    "recipe, means, at once": replace(RECIPE, means=True, **AT_ONCE),
    "recipe, logits distilled, 0.2": replace(RECIPE, distil_logits=0.2),
    "recipe, hidden states distilled": replace(RECIPE, distil_hidden=1.0),
}
SMALL = " at 17"  # 17 % removed in place of half
VARIANTS |= {
    name + SMALL: replace(v, share=0.17)
    for name, v in VARIANTS.items()
    if v.share == 0.5 and (name == "recipe" or name.startswith("recipe, "))
}
