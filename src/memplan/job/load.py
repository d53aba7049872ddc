"""
Reading a job: the file, then flags, then `--set`, each laid over the one before.

All that is wrong is collected on the way and reported at once, each problem with its file and line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memplan.errors import JobError, UnsupportedJob
from memplan.job.aliases import Not, translate
from memplan.job.check import Conflict, check_job, notes_on
from memplan.job.coerce import coerce
from memplan.job.data_names import BUILT_IN_DATA, PATH_FIELDS
from memplan.job.fields import job_fields, job_sections
from memplan.job.foreign import Foreign, Gap, Setting, foreign_notes, read_foreign
from memplan.job.parse import Block, parse, parse_yaml
from memplan.job.problems import Invalid, Problem, raise_problems, shorten
from memplan.job.source import expand_user, read_source
from memplan.job.spec import Job


class LoadedJob(NamedTuple):
    """A job and where it came from."""

    job: Job
    origins: dict[str, str]
    """Every dotted leaf field: `user`, `alias`, `tool default` or `memplan default`."""
    path: Path | None
    """The file; None for standard input and for a job made of flags alone."""
    base_dir: Path
    """What relative data paths are relative to."""
    notes: tuple[str, ...]
    """Settings without effect, and what was assumed where the file is another tool's; a sentence each."""
    tool: str | None = None
    """Whose file it is, where it is another tool's: `axolotl`."""

    def resolve_path(self, text: str) -> Path:
        """A path of `data.train` or `data.eval` as a real one: relative to the job file, `~` expanded."""
        return self.base_dir / expand_user(text)


def load_job(
    source: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    accelerate: str | None = None,
) -> LoadedJob:
    """
    Read a job, with changes from the command line laid over it: flags first, then overrides in order.

    Args:
        source: a path to YAML, JSON or TOML; the name of a ready job; `-` for YAML on standard input; None
            for a job that the flags and overrides describe alone.
        overrides: `a.b=value`, the value in YAML.
        flags: dotted fields and their values; a flag that is None was not given.
        accelerate: a file of accelerate's launch settings, which lies between the job and the flags.

    Raises:
        UnsupportedJob: another tool's file, or accelerate's, asks for what a job cannot say.
        JobError: the source cannot be read, or anything is wrong with the job; all of it is reported at once.
    """
    reader = _Reader()
    path, base_dir, name = None, Path.cwd(), "the job"
    if source is not None:
        read = read_source(source)
        path, base_dir, name = read.path, read.base_dir, read.name
        block = parse(read.text, suffix=read.suffix, name=name)
        foreign = read_foreign(block, name, base_dir)
        if foreign is None:
            reader.add_layer([_Written(entry.key, entry.value, name, entry.line) for entry in block.entries])
        else:
            reader.add_foreign(foreign, name)
    if accelerate is not None:
        reader.add_launch(accelerate)
    given = {field: value for field, value in (flags or {}).items() if value is not None}
    if given:
        reader.add_layer(_from_flags(given), on_top=True)
    for override in overrides:
        reader.add_override(override)
    reader.anchor_data_paths(base_dir)
    job = reader.finish(name)
    origins = {field: reader.origins.get(field, "memplan default") for field in job_fields()}
    written = [field for field, origin in origins.items() if origin in ("user", "alias")]
    notes, foreign = (*reader.notes, *notes_on(job, written)), reader.foreign
    if foreign is not None:
        notes = (*foreign_notes(foreign, job, origins), *notes)
    return LoadedJob(job, origins, path, base_dir, notes, None if foreign is None else foreign.tool)


class _Written(NamedTuple):
    """An entry, with the place to blame."""

    key: str
    value: Any
    source: str
    line: int | None = None

    @property
    def where(self) -> str:
        return f"{self.source} line {self.line}" if self.line else self.source


class _Setting(NamedTuple):
    """A field as one layer sets it."""

    value: Any
    written: _Written
    origin: str


class _Reader:
    """Lays layers of entries over each other and collects everything that is wrong with them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self._problems: list[Problem] = []
        self._failed: set[str] = set()
        self._places: dict[str, str] = {}
        self._anchored: set[str] = set()
        self._gaps: list[Gap] = []
        self._launched: set[str] | None = None
        self.foreign: Foreign | None = None
        self.notes: list[str] = []
        """Of accelerate's file."""

    def add_foreign(self, foreign: Foreign, name: str) -> None:
        """What another trainer's file says, its defaults included, under all that follows."""
        self.foreign = foreign
        self._problems += foreign.problems
        self._gaps += foreign.gaps
        self._add_settings(foreign.settings, name)

    def add_launch(self, path: str) -> None:
        """accelerate's launch settings, over a file that may leave to them how many GPUs there are."""
        from memplan.job.foreign.accelerate import launched, read_launch

        launch = read_launch(path)
        launched(launch, self.values.keys(), self.values.get("autocast"))
        settled = {setting.field for setting in launch.settings}
        self._gaps = [gap for gap in self._gaps if settled.isdisjoint(gap.fields)] + launch.gaps
        self._problems += launch.problems
        self.notes += launch.notes
        self._launched = settled
        self._add_settings(launch.settings, launch.name)

    def _add_settings(self, settings: Sequence[Setting], name: str) -> None:
        """Fields in any words that the job file knows."""
        for setting in settings:
            item = _Written(setting.key or setting.field, setting.value, name, setting.line)
            try:
                meant, _ = translate(setting.field, setting.value)
                values = {field: coerce(job_fields()[field], value) for field, value in meant.items()}
            except Invalid as invalid:
                message, choices = f"`{item.key}` {invalid.message}", job_fields()[setting.field].choices
                is_text = isinstance(setting.value, str) and not job_fields()[setting.field].patterns
                if choices is None or not is_text:
                    self._problems.append(Problem(item.where, message, invalid.hint))
                    continue
                hint = f"{invalid.hint}; `--set {setting.field}=VALUE` goes over the file"
                self._gaps.append(Gap(Problem(item.where, message, hint), (setting.field,)))
                continue
            for field, value in values.items():
                self._set(field, value, "alias" if setting.key else "tool default", item)

    def add_layer(self, written: Sequence[_Written], *, on_top: bool = False) -> None:
        """Lay entries over what is there; those `on_top` are of the command line and count as `user`."""
        layer: dict[str, _Setting] = {}
        denied: list[tuple[str, Not, _Written]] = []
        for item in self._leaves(written):
            for field, value, is_alias in self._translated(item):
                if isinstance(value, Not):
                    denied.append((field, value, item))
                    continue
                origin = "alias" if is_alias and not on_top else "user"
                self._put(layer, field, _Setting(value, item, origin))
        for field, setting in layer.items():
            self._set(field, setting.value, setting.origin, setting.written)
            if on_top:
                self._anchored.add(field)
        for field, value, item in denied:
            if value.unless is None or self.values.get(value.unless[0]) != value.unless[1]:
                self._deny(field, value.value, item, may_reset=on_top and field not in layer)

    def add_override(self, override: str) -> None:
        """Lay one `a.b=value` over what is there."""
        key, equals, text = override.partition("=")
        where = f"`--set {shorten(override)}`"
        if not equals or not key.strip():
            message = f"`{shorten(override)}` is not of the form `field=value`"
            self._problems.append(Problem(where, message, "write e.g. `--set lora.rank=8`"))
            return
        try:
            value = parse_yaml(text, where)
        except JobError:
            self._problems.append(
                Problem(
                    where,
                    f"`{shorten(text)}` is not a YAML value",
                    f"""put it in quotes: `--set '{key}="..."'`""",
                )
            )
            return
        self.add_layer([_Written(key.strip(), value, where)], on_top=True)

    def anchor_data_paths(self, base_dir: Path) -> None:
        """Data paths typed on the command line are relative to where they were typed, if they exist there."""
        if base_dir == Path.cwd():
            return
        for field in PATH_FIELDS:
            text = self.values.get(field)
            if field in self._anchored and text not in (None, BUILT_IN_DATA) and Path(text).exists():
                self.values[field] = str(Path(text).absolute())

    def finish(self, name: str) -> Job:
        """
        The job.

        Raises:
            JobError: anything was wrong, between the fields too.
        """
        if "model" not in self.values and "model" not in self._failed:
            self._problems.append(
                Problem(
                    name,
                    "`model` is missing",
                    "add e.g. `model: gpt2`: a hub id, a local folder, or a name from `memplan models`",
                )
            )
        if not self._problems:
            self._raise_gaps(name)
        job = _build({"model": "?", **self.values})
        for conflict in check_job(job):
            if self._failed.isdisjoint(conflict.fields):
                where = next(
                    (self._places[field] for field in conflict.fields if field in self._places), name
                )
                self._blame(conflict, where)
        if self._launched is not None and job.loop != "hf_trainer":
            hint = "set `loop: hf_trainer`, or leave `--accelerate` out"
            message = f"accelerate launches transformers' Trainer, not `loop: {job.loop}`"
            self._problems.append(Problem("`--accelerate`", message, hint))
        raise_problems(self._problems, name=name)
        self._raise_gaps(name)
        return job

    def _blame(self, conflict: Conflict, where: str) -> None:
        """What another tool's file leads to is no mistake of its author's, but what a job cannot say."""
        is_theirs = self.foreign is not None or not (self._launched or set()).isdisjoint(conflict.fields)
        if not is_theirs or not self._anchored.isdisjoint(conflict.fields):
            self._problems.append(Problem(where, conflict.message, conflict.hint))
        else:
            hint = f"{conflict.hint}; `--set FIELD=VALUE` goes over the file"
            self._gaps.append(Gap(Problem(where, conflict.message, hint), conflict.fields))

    def _raise_gaps(self, name: str) -> None:
        """What a foreign file asks for and no job can say, unless the command line says something else instead."""
        gaps = [gap.problem for gap in self._gaps if self._anchored.isdisjoint(gap.fields)]
        if len(gaps) == 1:
            raise UnsupportedJob(gaps[0].sentence, hint=gaps[0].hint)
        if gaps:
            lines = [f"  {gap.sentence}; {gap.hint}" for gap in gaps]
            raise UnsupportedJob(
                "\n".join([f"{name} asks for {len(gaps)} things that are not planned", *lines])
            )

    def _leaves(self, written: Sequence[_Written]) -> Iterator[_Written]:
        """The entries of sections, one by one; repeated ones are a problem and their first one counts."""
        seen: dict[str, _Written] = {}
        for item in written:
            for leaf in self._inside(item):
                first = seen.setdefault(leaf.key, leaf)
                if first is not leaf:
                    also = f", first in line {first.line}" if first.line else ""
                    self._report(leaf, f"`{leaf.key}` is given twice{also}", "keep one of them")
                else:
                    yield leaf

    def _inside(self, item: _Written) -> Iterator[_Written]:
        if item.key not in job_sections():
            yield item
        elif isinstance(item.value, Block):
            for entry in item.value.entries:
                line = entry.line if item.line else None
                yield _Written(f"{item.key}.{entry.key}", entry.value, item.source, line)
        elif item.value is not None:
            from memplan.job.suggest import section_hint

            message = f"`{item.key}` is a group of fields, not `{shorten(item.value)}`"
            self._report(item, message, section_hint(item.key))

    def _translated(self, item: _Written) -> Iterator[tuple[str, Any, bool]]:
        """(field, value of its type or `Not`, whether in another tool's words) for each field it sets."""
        try:
            settings, is_alias = translate(item.key, item.value)
        except KeyError:
            from memplan.job.suggest import unknown_field_hint

            self._report(item, f"unknown field `{shorten(item.key)}`", unknown_field_hint(item.key))
            return
        except Invalid as invalid:
            self._report(item, f"`{item.key}` {invalid.message}", invalid.hint)
            return
        for field, value in settings.items():
            try:
                yield field, value if isinstance(value, Not) else coerce(job_fields()[field], value), is_alias
            except Invalid as invalid:
                self._failed.add(field)
                self._report(item, f"`{item.key}` {invalid.message}", invalid.hint)

    def _report(self, item: _Written, message: str, hint: str) -> None:
        self._problems.append(Problem(item.where, message, hint))

    def _put(self, layer: dict[str, _Setting], field: str, setting: _Setting) -> None:
        known = layer.get(field)
        if known is None:
            layer[field] = setting
        elif known.value != setting.value:
            first, second = known.written, setting.written
            self._report(
                second,
                f"`{first.key}: {shorten(first.value)}` and `{second.key}: {shorten(second.value)}` "
                f"disagree about `{field}`",
                "keep one of them",
            )
        elif setting.origin == "user":
            layer[field] = setting

    def _deny(self, field: str, value: Any, item: _Written, *, may_reset: bool) -> None:
        default = job_fields()[field].default
        if self.values.get(field, default) != value:
            return
        if may_reset and default != value:
            self._set(field, default, "user", item)
            return
        self._report(
            item,
            f"`{item.key}: {shorten(item.value)}` contradicts `{field}: {shorten(value)}`",
            f"remove it, or set `{field}` to something else",
        )

    def _set(self, field: str, value: Any, origin: str, written: _Written) -> None:
        self.values[field] = value
        self.origins[field] = origin
        self._places[field] = written.where
        self._failed.discard(field)


def _from_flags(flags: Mapping[str, Any]) -> list[_Written]:
    return [
        _Written(field, value, f"`--{field.replace('_', '-').replace('.', '-')}`")
        for field, value in flags.items()
    ]


def _build(values: Mapping[str, Any]) -> Job:
    nested: dict[str, dict[str, Any]] = {section: {} for section in job_sections()}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        if rest:
            nested[section][rest] = value
        else:
            flat[name] = value
    sections = {name: job_sections()[name](**inner) for name, inner in nested.items()}
    return Job(**flat, **sections)
