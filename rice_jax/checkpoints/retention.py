"""Which checkpoints a run keeps."""

from collections.abc import Mapping, Sequence


def steps_to_keep(steps: Sequence[int], *, newest: int | None, every: int, recall: Mapping[int, float]) -> set[int]:
    """Returns those of `steps`, oldest first, that at least one rule keeps.

    Kept are the `newest` last ones (all for None or 0), those that `every` divides (none for 0), and of those that have
    a recall@1 in `recall` the one with the highest; of equal ones the newest.
    """
    keep = set(steps[-(newest or len(steps)) :])
    keep |= {step for step in steps if every and step % every == 0}
    evaluated = [step for step in steps if step in recall]
    if evaluated:
        keep.add(max(evaluated, key=lambda step: (recall[step], step)))
    return keep
