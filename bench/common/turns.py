"""How calls of single ops take turns: `prunekern.machine.measure.interleaved`, as every comparison of them wants it."""

from functools import partial

from prunekern.machine.measure import interleaved

# Seconds are for each, and the order turns round, so that nobody always follows the same neighbour.
race = partial(interleaved, least=5, each=True, turning=True)
