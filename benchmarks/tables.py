"""Tables for a page."""

from rich.table import Table


def markdown(table: Table) -> str:
    """The lines of `table` in Markdown, below its title."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [[str(column.header) for column in table.columns], ["---"] * len(table.columns), *rows]
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""])
