"""Declarative base: named constraints, JSON that is JSONB on Postgres, times as unix seconds (UTC by definition)."""

from typing import Any

from sqlalchemy import JSON, Index, MetaData, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase

JSON_VALUE = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def index_of_some(name: str, column: str, rows: str) -> Index:
    """An index of the rows that a condition in SQL describes."""
    return Index(name, column, sqlite_where=text(rows), postgresql_where=text(rows))


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JSON_VALUE, list[Any]: JSON_VALUE}  # noqa: RUF012
