"""The batch norms among the flat names of a file."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jbn._libraries.entries import check_mapping
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
    check_mapping(source, entries, hint or f"{library.title} writes {', '.join(library.names)}.")
    hint = hint or "A whole network's are for jbn.convert.find."
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
    check_mapping(
        source, entries, "Such are model.state_dict() and, of Keras, {each.path: each for each in model.weights}."
    )
    if others := [name for name in entries if not isinstance(name, str)]:
        raise TypeError(
            f"{source} has names such as {others[0]!r}; expected strings, as flax.traverse_util.flatten_dict(tree, "
            f"sep='/') gives."
        )
    if nested := [name for name, value in entries.items() if isinstance(value, Mapping)]:
        raise TypeError(
            f"{source} has mappings in {', '.join(map(repr, nested))}; expected arrays by name: of a checkpoint pass "
            f"checkpoint['state_dict'], or whatever holds them; of a nested tree the flat one, such as "
            f"flax.traverse_util.flatten_dict(tree, sep='/')."
        )
    present = {name: value for name, value in entries.items() if value is not None}
    _, _, mean, var = library.names
    found = {layer: names for layer, names in grouped(library, present).items() if {mean, var} <= names.keys()}
    if not found and (meant := [name for name in LIBRARIES if has_layers(LIBRARIES[name], present)]):
        raise ValueError(
            f"{source} has no layer with {mean} and {var}, which {library.title} writes. The names fit "
            f"{', '.join(map(repr, meant))}."
        )
    used = {full for names in found.values() for full in names.values()}
    return found, tuple(name for name in entries if name not in used)


def has_layers(library: Library, entries: Mapping[str, Any]) -> bool:
    """Whether a network has a batch norm by these names; a mean and a variance alone may be anything."""
    scale, bias, *needed = (*library.names, *library.needed)
    groups = grouped(library, entries).values()
    return not library.nameless and any({*needed} <= names.keys() and {scale, bias} & names.keys() for names in groups)


def fitting(entries: Mapping[str, Any]) -> list[str]:
    """The libraries by whose names `entries` is one batch norm."""

    def fits(library: Library) -> bool:
        groups = list(grouped(library, entries).values())
        wanted = {*library.names[2:], *library.needed}
        return len(groups) == 1 and wanted <= groups[0].keys() and len(groups[0]) == len(entries)

    return [name for name, library in LIBRARIES.items() if fits(library)]
