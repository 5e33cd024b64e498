"""Random words: the same for ever, different for every address, and both ends of a range are reached."""

import numpy as np

from data_pipeline.input.augment import WHOLE_CLIP, augment_words
from data_pipeline.input.random_words import below, uniform


def test_words_never_change():
    assert [hex(word) for word in augment_words(1, 2, 3, 4, 2)] == ["0xe68bb1ac73a6d654", "0x6e4d78251d7be7f8"]


def test_words_differ_between_seeds_epochs_examples_and_pictures():
    keys = [(s, e, x, p) for s in (0, 1) for e in (0, 1) for x in (0, 1) for p in (0, 1, 2, WHOLE_CLIP)]
    drawn = {int(word) for key in keys for word in augment_words(*key, 8)}
    assert len(drawn) == len(keys) * 8


def test_below_reaches_both_ends_and_no_further():
    top = np.uint64(2**64 - 1)
    for bound in (1, 2, 10, 33, 1000):
        assert (below(np.uint64(0), bound), below(top, bound)) == (0, bound - 1)
    assert uniform(np.uint64(0), 0.5, 1.5) == 0.5
    assert 1.5 - 1e-9 < uniform(top, 0.5, 1.5) <= 1.5
