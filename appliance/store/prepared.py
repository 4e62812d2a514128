"""Statements compiled once, for a writer that executes the same few for ever.

Rules:

- What is prepared does exactly what executing the statement would do. Where that is in doubt (defaults made in Python,
  RETURNING, values that change the text) nothing is prepared.
- Values are bound by their column's types here as there: an `Encrypted` column refuses plaintext.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from sqlalchemy import Delete, Dialect, Executable, Insert, Update
from sqlalchemy.engine.interfaces import DBAPICursor

_Processor = Callable[[Any], Any]


class Prepared:
    """One statement for rows that name the same values: its text, and how a row becomes the driver's parameters."""

    __slots__ = ("_places", "text")

    def __init__(self, text: str, places: Sequence[tuple[str, object, _Processor | None]]) -> None:
        self.text = text
        self._places = places

    @classmethod
    def of(cls, statement: Executable, names: Sequence[str], dialect: Dialect) -> Self | None:
        """The statement for rows of `names`; None where it has to be executed as it is."""
        if not isinstance(statement, Insert | Update | Delete) or dialect.paramstyle != "qmark":
            return None
        compiled = statement.compile(dialect=dialect, column_keys=list(names))
        if compiled.positiontup is None:
            return None  # text that no value is bound to
        if compiled.insert_prefetch or compiled.update_prefetch or compiled.effective_returning:
            return None
        if compiled.post_compile_params or compiled.literal_execute_params:
            return None
        places: list[tuple[str, object, _Processor | None]] = []
        for name in compiled.positiontup:
            bind = compiled.binds[name]
            if bind.required and name not in names:
                return None
            places.append((name, bind.effective_value, bind.type.dialect_impl(dialect).bind_processor(dialect)))
        if not set(names) <= {name for name, _, _ in places}:
            return None
        return cls(compiled.string, places)

    def execute(self, cursor: DBAPICursor, rows: Sequence[Mapping[str, object]]) -> None:
        """Execute it for each row."""
        if len(rows) == 1:
            cursor.execute(self.text, self.row(rows[0]))
        else:
            cursor.executemany(self.text, [self.row(row) for row in rows])

    def row(self, row: Mapping[str, object]) -> tuple[Any, ...]:
        """A row's values as the driver takes them, in their order.

        Raises:
            TypeError: plaintext for an `Encrypted` column.
        """
        return tuple(
            [
                row.get(name, default) if process is None else process(row.get(name, default))
                for name, default, process in self._places
            ]
        )
