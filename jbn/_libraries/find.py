"""The batch norms among the flat names of a file."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jbn._libraries.entries import pick
from jbn._libraries.library import Library
from jbn._libraries.rows import LIBRARIES

Names = dict[str, str]  # full names by the library's own
BEHIND = r"(?::\d+|/\.ATTRIBUTES/VARIABLE_VALUE)?"  # in files of TensorFlow 1 and 2


@cache
def pattern(library: Library) -> re.Pattern:
    """A collection, the layer, and the library's own name; what TensorFlow writes behind it.

    The parts of a name are apart by dots or slashes, whichever the file has; Haiku has a ~ between them.
    """
    names = "|".join("[./]".join(map(re.escape, plain(name).split("."))) for name in library.all_names)
    collection = f"(?:(?:{'|'.join(library.collections)})[./:])?" if library.collections else ""
    return re.compile(
        rf"{collection}(?:(?P<layer>.*?)[{library.separators}])??(?:~[./])?(?P<name>{names}){BEHIND}", re.DOTALL
    )


def plain(name: str) -> str:
    return name.replace("/", ".")


def grouped(library: Library, entries: Mapping[str, Any]) -> dict[str, Names]:
    """Full names of what may be a layer, by the name of that layer."""
    own = {plain(name): name for name in library.all_names}
    groups: dict[str, Names] = {}
    for full in entries:
        match = pattern(library).fullmatch(full) if isinstance(full, str) else None
        if match:
            names = groups.setdefault(match["layer"] or "", {})
            name = own[plain(match["name"])]
            names[full if name in names else name] = full  # a second one is unknown
    return groups


def one_layer(library: Library, entries: Any, source: str, hint: str) -> dict[str, Any]:
    """The entries of one layer by the library's own names, and what else there is by its own."""
    if not isinstance(entries, Mapping):
        pick(
            source, entries, (), (), hint or f"{library.title} writes {', '.join(library.names)}."
        )  # says what is wrong
    groups = grouped(library, entries)
    if len(groups) > 1:
        first, second, *_ = groups.values()
        name = next((name for name in first if name in second), None)
        if name:
            given = ", ".join(repr(names[name]) for names in groups.values() if name in names)
            raise ValueError(f"{source} has several entries named {name}: {given}. Pass those of one layer. {hint}")
        given = ", ".join(repr(full) for names in groups.values() for full in names.values())
        raise ValueError(f"{source} has entries of several layers: {given}. Pass those of one layer. {hint}")
    names = next(iter(groups.values()), {})
    used = set(names.values())
    return {name: entries[full] for name, full in names.items()} | {
        full: value for full, value in entries.items() if full not in used
    }


def layers(library: Library, entries: Any, source: str) -> tuple[dict[str, Names], tuple[str, ...]]:
    """Full names of every batch norm, by its layer, and those of all that belongs to none."""
    if library.nameless:
        raise ValueError(
            f"{library.title} has no names in its files, but {library.nameless}: there is nothing to find by. Pass the "
            f"entries of each layer to jbn.convert.from_library, by the names {', '.join(library.names)}."
        )
    if not isinstance(entries, Mapping):
        raise TypeError(f"{source} is a {type(entries).__name__}; expected arrays by name, as model.state_dict().")
    if nested := [name for name, value in entries.items() if isinstance(value, Mapping)]:
        raise TypeError(
            f"{source} has mappings in {', '.join(map(repr, nested))}; expected arrays by name: of a checkpoint pass "
            f"checkpoint['state_dict'], or whatever holds them; of a nested tree the flat one, such as "
            f"flax.traverse_util.flatten_dict(tree, sep='/')."
        )
    present = {name: value for name, value in entries.items() if value is not None}
    _, _, mean, var = library.names
    found = {layer: names for layer, names in grouped(library, present).items() if {mean, var} <= names.keys()}
    used = {full for names in found.values() for full in names.values()}
    return found, tuple(name for name in entries if name not in used)


def fitting(entries: Mapping[str, Any]) -> list[str]:
    """The libraries by whose names `entries` is one batch norm."""

    def fits(library: Library) -> bool:
        groups = list(grouped(library, entries).values())
        wanted = {*library.names[2:], *library.needed}
        return len(groups) == 1 and wanted <= groups[0].keys() and len(groups[0]) == len(entries)

    return [name for name, library in LIBRARIES.items() if fits(library)]
