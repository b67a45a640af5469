"""The table of `make faults` fits the code and its tests."""

import faults
import pytest

FAULTS = faults.read()


def test_each_text_is_there_once_and_each_test_too():
    assert faults.misplaced(FAULTS) == []
    assert sum(not fault.of_peers for fault in FAULTS) >= 60


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("in jbn/ there is 0 times: nowhere", {"old": "nowhere"}),
        ("'(' was never closed", {"new": "("}),
        ("there is no test", {"tests": []}),
        ("there is no tests/test_gone.py", {"tests": ["tests/test_gone.py"]}),
        ("there is no tests/test_units.py::test_gone[a]", {"tests": ["tests/test_units.py::test_gone[a]"]}),
        ("stands there 2 times", {"name": FAULTS[1].name}),
    ],
)
def test_what_does_not_fit_is_told(message, change):
    (found,) = faults.misplaced([FAULTS[0]._replace(**change), FAULTS[1]])
    assert message in found
