"""Remedies for fields that do not exist: the nearest name that does."""

from __future__ import annotations

from memplan.job.aliases import ALIASES, REMEDIES
from memplan.job.fields import job_fields, job_sections
from memplan.job.problems import listed


def unknown_field_hint(key: str) -> str:
    """What the user may have meant by the field `key` (dotted), or where to find out."""
    last = key.rsplit(".", 1)[-1]
    if last in REMEDIES:
        return REMEDIES[last]
    candidates = _same_last_name(last) or _nearest(key)
    if candidates:
        return f"did you mean {listed(candidates)}?"
    section = key.split(".")[0]
    if section in job_sections():
        return section_hint(section)
    return "remove it, or find its name here: `memplan schema` lists every field"


def section_hint(section: str) -> str:
    """The fields of a section, and how to write one."""
    names = [name.split(".")[1] for name in job_fields() if name.startswith(f"{section}.")]
    return f"write `{section}: {{{names[0]}: ...}}`; its fields are {', '.join(names)}"


def _same_last_name(last: str) -> list[str]:
    return [name for name in job_fields() if name.rsplit(".", 1)[-1] == last]


def _nearest(key: str) -> list[str]:
    import difflib

    names = {name: [alias.field] for name, alias in ALIASES.items()}
    names |= {name: [name] for name in (*job_fields(), *job_sections())}
    spellings = {
        last: _same_last_name(last) for last in (name.rsplit(".", 1)[-1] for name in job_fields())
    } | names
    for spelling in (key, key.rsplit(".", 1)[-1]):
        close = difflib.get_close_matches(spelling.lower(), spellings, n=1, cutoff=0.75)
        if close:
            return spellings[close[0]]
    return []
