"""A prepared statement does what executing the statement does, or there is none."""

from collections.abc import Mapping

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Executable,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    bindparam,
    create_engine,
    delete,
    exists,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from appliance.store import Encrypted, Envelope
from appliance.store.prepared import Prepared

TABLE = Table(
    "things",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("count", Integer),
    Column("weight", Float),
    Column("sealed", Encrypted),
    Column("plain", LargeBinary),
    Column("list", Text, default="made in Python"),
)
ROW = {"id": "a", "count": 1, "weight": 0.5, "sealed": Envelope(b"x"), "plain": b"y", "list": "z"}
UPSERT = sqlite.insert(TABLE)

SAME: dict[str, tuple[Executable, Mapping[str, object]]] = {
    "insert": (insert(TABLE), ROW),
    "insert some": (insert(TABLE).values(list=None), {"id": "a", "count": None}),
    "insert from select": (
        insert(TABLE).from_select(
            ["id", "count", "list"],
            select(bindparam("b_id", type_=Text), literal(7), literal("x")).where(
                ~exists().where(TABLE.c.id == bindparam("b_id", type_=Text))
            ),
        ),
        {"b_id": "new"},
    ),
    "update": (
        update(TABLE).where(TABLE.c.id == bindparam("b_id")).values(count=TABLE.c.count + bindparam("b_more")),
        {"b_id": "there", "b_more": 4},
    ),
    "delete": (delete(TABLE).where(TABLE.c.id == bindparam("b_id")), {"b_id": "there"}),
    "upsert": (
        UPSERT.on_conflict_do_update(index_elements=["id"], set_={"count": TABLE.c.count + UPSERT.excluded.count}),
        {"id": "there", "count": 5, "list": "w"},
    ),
}


def after(statement: Executable, values: Mapping[str, object], *, prepared: bool) -> list[tuple[object, ...]]:
    """What the table holds when the statement was executed one way or the other."""
    engine = create_engine("sqlite://")
    TABLE.metadata.create_all(engine)
    with engine.begin() as db:
        db.execute(insert(TABLE), {"id": "there", "count": 10})
        _run(db, statement, values, prepared=prepared)
        held = [tuple(row) for row in db.execute(select(TABLE).order_by(TABLE.c.id))]
    engine.dispose()
    return held


def _run(db: Connection, statement: Executable, values: Mapping[str, object], *, prepared: bool) -> None:
    if not prepared:
        db.execute(statement, [values])
        return
    made = Prepared.of(statement, tuple(values), db.dialect)
    assert made is not None
    cursor = db.connection.cursor()
    made.execute(cursor, [values])
    cursor.close()


@pytest.mark.parametrize(("statement", "values"), SAME.values(), ids=SAME.keys())
def test_it_does_what_the_statement_does(statement: Executable, values: Mapping[str, object]) -> None:
    assert after(statement, values, prepared=True) == after(statement, values, prepared=False)


def test_several_rows_are_executed_together() -> None:
    engine = create_engine("sqlite://")
    TABLE.metadata.create_all(engine)
    with engine.begin() as db:
        made = Prepared.of(insert(TABLE), ("id", "list"), db.dialect)
        assert made is not None
        cursor = db.connection.cursor()
        made.execute(cursor, [{"id": name, "list": name.upper()} for name in "abc"])
        cursor.close()
        held = db.execute(select(TABLE.c.id, TABLE.c.list).order_by(TABLE.c.id)).all()
    engine.dispose()
    assert [tuple(row) for row in held] == [("a", "A"), ("b", "B"), ("c", "C")]


def test_an_encrypted_column_refuses_plaintext_here_too() -> None:
    made = Prepared.of(insert(TABLE), tuple(ROW), sqlite.dialect())
    assert made is not None
    with pytest.raises(TypeError, match="not plaintext"):
        made.row({**ROW, "sealed": b"plaintext"})


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        (insert(TABLE), ("id",)),  # a default made in Python
        (insert(TABLE).returning(TABLE.c.id), tuple(ROW)),
        (delete(TABLE).where(TABLE.c.id.in_(bindparam("ids", expanding=True))), ("ids",)),
        (delete(TABLE).where(TABLE.c.id == bindparam("b_id")), ()),  # a value is missing
        (delete(TABLE), ("b_id",)),  # a value too many
        (text("DELETE FROM things"), ()),
        (select(TABLE), ()),
    ],
)
def test_where_it_might_do_something_else_there_is_none(statement: Executable, names: tuple[str, ...]) -> None:
    assert Prepared.of(statement, names, sqlite.dialect()) is None


def test_for_a_server_there_is_none() -> None:
    server = postgresql.dialect()  # type: ignore[no-untyped-call]
    assert Prepared.of(insert(TABLE), tuple(ROW), server) is None
