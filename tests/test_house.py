"""House rules that belong to no room: what the documentation says is true, and facts have sources."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import consoles, reference

from memplan.cli.app import COMMANDS
from memplan.job.load import load_job

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "memplan"
PAGES = reference.pages()
HAND_WRITTEN = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
MOST_LINES = 400

# Folders of one machine, and notes to oneself.
UNWANTED = re.compile(r"(?<![\w.])/(?:work|farm)/|/tmp/[a-z]+[-_/]|/roo[t]/|\bTOD[O]\b|\bFIXM[E]\b")


def name_of(path: Path) -> str:
    """A path as test ids show it."""
    return str(path.relative_to(ROOT))


def source_files() -> list[Path]:
    """Every text file of the repository that people write."""
    folders = [ROOT / name for name in ("src", "tests", "tools", "benchmarks", "docs", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    files += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt")]
    return [path for path in files if path.is_file()]


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# -- the documentation is true -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    """Console outputs and generated tables are what the code gives today: `python -m tools.reference`."""
    text = page.read_text(encoding="utf-8")

    assert reference.render(text) == text


def test_the_readme_shows_real_output() -> None:
    """The first thing that a reader sees is a command and what it prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = list(consoles.commands(text))

    assert text.index("```console") < text.index("```sh")
    assert any(command.startswith("memplan estimate ") for command in shown)


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Every `memplan ...` that a page mentions is a command, and its flags are flags of that command."""
    text = page.read_text(encoding="utf-8")
    for name, rest in re.findall(r"(?<![\w/.-])memplan (?!default)([a-z]+)\b([^`\n#|&$()]*)", code_of(text)):
        assert name in COMMANDS, f"memplan {name}"
        help_text = "\n".join(consoles.run(f"memplan {name} --help"))
        for flag in re.findall(r"(?<!\S)(--[a-z][a-z-]+)", rest):
            assert flag in ("--help", "--version") or flag in help_text, f"memplan {name} {flag}"


def code_of(text: str) -> str:
    """Code spans and code blocks of a page, without what is generated from the code anyway."""
    text = re.sub(r"<!-- generated: .*?<!-- end -->", "", text, flags=re.DOTALL)
    fenced = re.findall(r"^```(?!python)[a-z]+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*fenced, *spans])


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_python_examples_run(page: Path) -> None:
    """A ```python block is a program that ends well."""
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_job_examples_can_be_read(page: Path, tmp_path: Path) -> None:
    """A ```yaml block that names a model is a job without a mistake."""
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        if block.startswith("model:"):
            path = tmp_path / "job.yaml"
            path.write_text(block, encoding="utf-8")
            assert load_job(path).notes == ()


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Links within the repository name files that are there, and headings of theirs."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if heading:
            assert heading in headings(path), target


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_result_page_has_every_field() -> None:
    """Each table of docs/result.md has the fields and types of its object in the schema, in order."""
    from memplan.render.schema import result_schema

    schema = result_schema()
    definitions = schema["$defs"]
    objects = {"The object": schema, "Frontier": schema["properties"]["frontier"]["anyOf"][0]}
    objects["Preflight"] = schema["properties"]["preflight"]["anyOf"][0]
    in_job = type_names(definitions["Job"], definitions)
    objects |= {name: found for name, found in definitions.items() if name not in in_job}
    text = (ROOT / "docs" / "result.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))

    assert set(objects) == set(sections)
    for name, found in objects.items():
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", sections[name], re.MULTILINE)
        expected = [(field, type_words(schema)) for field, schema in found["properties"].items()]
        assert expected == rows, name


def type_names(schema: Any, definitions: dict[str, Any]) -> set[str]:
    """`Job` and the objects in it, which the page of the job file describes."""
    names = {"Job"}
    for reference_to in re.findall(r"#/\$defs/(\w+)", json.dumps(schema)):
        names |= {reference_to} | type_names(definitions[reference_to], definitions)
    return names


def type_words(schema: dict[str, Any]) -> str:
    """A schema as the page words it."""
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(type_words, schema["anyOf"]))
    if schema["type"] == "array" and "items" in schema:
        return f"list of {type_words(schema['items'])}"
    if schema["type"] == "array":
        return f"[{', '.join(map(type_words, schema['prefixItems']))}]"
    return str(schema["type"])


def test_the_preflight_page_has_every_lint() -> None:
    """The table of lints lists the codes of the rules, no more and no fewer."""
    tree = ast.parse((PACKAGE / "preflight" / "lints.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    codes = [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "Lint"]
    text = (ROOT / "docs" / "preflight-ci.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", text.partition("## Lints")[2], re.MULTILINE)

    assert sorted(codes) == sorted(listed)


def test_the_first_two_shell_blocks_are_the_quick_start() -> None:
    """Set up and run the main job, then set up and pass the tests; `.ci/run` takes the second from here."""
    first, second = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "sh")[:2]

    assert [line.split()[0] for line in first.splitlines()] == ["pip", "memplan"]
    assert [line.split()[0] for line in second.splitlines()] == ["pip", "pytest"]


@given(st.lists(st.sampled_from(["a 1", "a 2", "b", "c d e", ""])), st.data())
def test_refreshing_an_excerpt_of_the_output_changes_nothing(output: list[str], data: st.DataObject) -> None:
    """An excerpt without elisions is the whole output; one with an end elided keeps its length."""
    count = data.draw(st.integers(0, len(output)))

    assert output == consoles.excerpt(output, ["x"] * len(output), "x")
    assert [*output[:count], "..."] == consoles.excerpt(output, [*output[:count], "..."], "x")


# -- facts have sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((PACKAGE / "profiles").rglob("*.json")), ids=name_of)
def test_every_profile_names_its_source(path: Path) -> None:
    """Each model, GPU, context and error band says where its numbers are from."""
    unsourced = [where for where, entry in entries(json.loads(path.read_text(encoding="utf-8"))) if not entry]

    assert [] == unsourced


def entries(data: Any, where: str = "") -> list[tuple[str, str]]:
    """(place, source) of every object that holds a number and lies in none that names a source."""
    if isinstance(data, list):
        return [found for index, item in enumerate(data) for found in entries(item, f"{where}[{index}]")]
    if not isinstance(data, dict):
        return []
    source = data.get("source") or data.get("why")
    holds_numbers = any(isinstance(value, (int, float)) for value in data.values())
    if source or holds_numbers:
        own = [f"{name[:-4]}_source" for name in data if name.endswith("_mib")]
        if not source and own and all(data.get(name) for name in own):
            inner = [item for item in data.items() if isinstance(item[1], (dict, list))]
            return [found for name, item in inner for found in entries(item, f"{where}.{name}")]
        return [(where or "top", source or "")]
    return [found for name, item in data.items() for found in entries(item, f"{where}.{name}")]


def test_an_entry_without_a_source_is_found() -> None:
    """The test above can fail."""
    assert [("[0]", "")] == entries([{"name": "x", "memory_mib": 1}])
    assert [("[0]", "log")] == entries([{"name": "x", "memory_mib": 1, "source": "log"}])


@pytest.mark.parametrize("path", sorted((PACKAGE / "profiles" / "jobs").glob("*.yaml")), ids=name_of)
def test_every_ready_job_says_what_it_is(path: Path) -> None:
    """Its first line is a comment, which `memplan jobs` prints."""
    assert re.match(r"# \S.{20,}\n", path.read_text(encoding="utf-8"))


# -- the code is in order ------------------------------------------------------------------------------------


def test_no_file_is_two_rooms() -> None:
    """No Python file is longer than `MOST_LINES`."""
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}

    assert {} == {name: length for name, length in lengths.items() if length > MOST_LINES}


def python_files() -> list[Path]:
    """Every Python file of the repository."""
    return [path for path in source_files() if path.suffix == ".py"]


def test_nothing_of_one_machine_is_left_behind() -> None:
    """No file names folders of the machine that it was written on, nor notes to oneself."""
    found = {}
    for path in source_files():
        match = UNWANTED.search(path.read_text(encoding="utf-8", errors="ignore"))
        if match:
            found[name_of(path)] = match[0]

    assert {} == found


def test_unwanted_words_would_be_found() -> None:
    """The test above can fail."""
    assert UNWANTED.search("see /" + "root/notes")
    assert UNWANTED.search("# TO" + "DO")
    assert not UNWANTED.search("a network/working path")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    """Every module begins with a docstring; empty `__init__.py` files are none."""
    text = path.read_text(encoding="utf-8")

    assert not text.strip() or ast.get_docstring(ast.parse(text))


def packages_with_exports() -> list[str]:
    """Packages whose `__init__.py` has an `__all__`."""
    paths = sorted(PACKAGE.rglob("__init__.py"))
    exporting = [path.parent for path in paths if "__all__" in path.read_text(encoding="utf-8")]
    return [".".join(folder.relative_to(PACKAGE.parent).parts) for folder in exporting]


@pytest.mark.parametrize("name", packages_with_exports())
def test_what_packages_export_is_documented(name: str) -> None:
    """Every function and class in `__all__` has a docstring of its own."""
    if name == "memplan.npt":
        pytest.importorskip("torch")
    package = import_module(name)
    exported = {symbol: getattr(package, symbol) for symbol in package.__all__}
    undocumented = [
        symbol
        for symbol, value in exported.items()
        if callable(value) and not (value.__doc__ and not value.__doc__.startswith(f"{symbol}("))
    ]

    assert [] == undocumented
