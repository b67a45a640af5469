"""Several processes give the outputs, the state and the gradients of one device, and none is left behind."""

import pytest
import ways
from processes import WAYS, launch


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_the_split_batch_is_the_whole(processes, devices):
    found = launch(processes, devices)
    assert [len(rows) for rows in found] == [len(WAYS) * 4 + 1] * processes
    for rows in found:
        for *case, differences in rows:
            assert not ways.too_far(differences), case


def test_what_a_failing_process_wrote_is_told():
    with pytest.raises(RuntimeError, match="invalid int value: 'many'"):
        launch(2, "many")


def test_patience_has_an_end():
    with pytest.raises(RuntimeError, match=r"exit codes \[None, None\]"):
        launch(2, 1, limit=0.5)
