"""Several processes give the outputs, the state and the gradients of one device, and none is left behind."""

from collections import Counter

import pytest
import ways
from processes import FORMS, launch


def test_the_split_batch_is_the_whole():
    found = launch()
    for process, rows in enumerate(found):
        counts = Counter(tuple(form) for form, *_ in rows)
        assert counts.keys() == {form for form in FORMS if process < form[0]} and min(counts.values()) >= 8
        for *case, differences in rows:
            assert not ways.too_far(differences), case


def test_what_a_failing_process_wrote_is_told():
    with pytest.raises(RuntimeError, match="invalid int value: 'many'"):
        launch(2, "many")


def test_patience_has_an_end():
    with pytest.raises(RuntimeError, match=r"exit codes \[None, None\]"):
        launch(2, 1, limit=0.5)
