"""Hints for columns that were not found: the option that names them, ready to be copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def hint(forms: Sequence[tuple[Mapping[str, Sequence[str]], Collection[str]]], present: Sequence[str]) -> str:
    """``--columns`` as it would be written: with the columns that go by another spelling of a usual name, where they make a form
    whole, or else with an example.

    Args:
        forms: the usual names of each role, and the roles that are needed.
        present: the columns there are.
    """
    alike = [found for roles, needed in forms if set(needed) <= set(found := _ignoring_case(roles, present))]
    if alike:
        return f"Capitals count; name the columns: {_said(alike[0])}"
    example = {role: role.upper() for role in forms[0][1]}
    return f"If they go by other names, say which column plays which role (columns: role=name), as in {_said(example)}"


def _ignoring_case(roles: Mapping[str, Sequence[str]], present: Sequence[str]) -> dict[str, str]:
    """The column of every role that has one."""
    lower = {name.lower(): name for name in reversed(present)}
    found = {role: next((lower[usual] for usual in names if usual in lower), None) for role, names in roles.items()}
    return {role: name for role, name in found.items() if name is not None}


def _said(names: Mapping[str, str]) -> str:
    quoted = "'" if any(not name.isidentifier() for name in names.values()) else ""
    return f"--columns {quoted}{','.join(f'{role}={name}' for role, name in names.items())}{quoted}"
