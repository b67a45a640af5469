"""A row of the table."""

from typing import NamedTuple


class Library(NamedTuple):
    """What the names, numbers and arrays of one library mean."""

    title: str
    version: str  # the one that was seen
    names: tuple[str, str, str, str]  # of scale, bias, mean and variance in its files
    unbiased: bool  # the running variance divides by n - 1
    decay: float  # default weight of the old value; 1 where nothing moves
    momentum: str  # what its number is the weight of: the "old" value, the "new" one, or "" without a number
    epsilon: float = 1e-5
    counter: str = ""  # written beside them, and without meaning for evaluation
    ignored: tuple[str, ...] = ()  # others that may be there, and are not written
    needed: tuple[str, ...] = ()  # others without which the averages cannot be read
    collections: tuple[str, ...] = ()  # what may stand before all names of a file
    separators: str = "./"  # between the name of a layer and these names
    shape: str = "[C]"
    running: str = ""  # shape of the running statistics, where it is another
    scale: str = "plain"  # how the scale is stored: see `scale.py`
    start: float = 1.0  # the running variance before the first step; the mean is 0
    evidence: str = "full"  # how the averages are kept: see `read.py`
    nameless: str = ""  # what its files hold in the place of names
    surprise: str = ""
    evaluation: str = ""  # why its evaluation is another than that of jbn
    training: str = ""  # why the output of its training step is
    read: str = ""  # why it was read, and not run

    @property
    def added(self) -> float:
        """The epsilon that `jbn` adds to the variance."""
        return self.epsilon / (1 - self.epsilon) if self.scale == "blended" else self.epsilon

    @property
    def all_names(self) -> tuple[str, ...]:
        return tuple(filter(None, (*self.names, *self.needed, self.counter, *self.ignored)))
