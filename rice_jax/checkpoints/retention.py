"""The rules that decide which checkpoints are kept."""

from collections.abc import Mapping, Sequence


def steps_to_keep(steps: Sequence[int], *, newest: int | None, every: int, recall: Mapping[int, float]) -> set[int]:
    """Returns the steps that at least one rule keeps.

    Args:
      steps: the complete steps, oldest first.
      newest: the number of newest steps to keep; None or 0 keeps all.
      every: steps that this number divides are kept; 0 switches the rule off.
      recall: recall@1 by step. Of the `steps` in it the one with the highest recall is kept; of equal ones the newest.
    """
    keep = set(steps[-(newest or len(steps)) :])
    keep |= {step for step in steps if every and step % every == 0}
    evaluated = [step for step in steps if step in recall]
    if evaluated:
        keep.add(max(evaluated, key=lambda step: (recall[step], step)))
    return keep
