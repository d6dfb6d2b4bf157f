"""The README and the pages it links to: short, true links, commands that parse, Python that runs, a citation that is read."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rrepa_lab.cli import main
from rrepa_lab.paths import bundled

ROOT = bundled("assets").parent
PAGES = ["README.md", "app/README.md", "notebooks/README.md", "assets/studies/README.md", "assets/benchmarks.md"]
OTHERS = {"pip", "pytest", "jupyter"}  # commands that are not ours


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every command of a page's shell blocks."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found.append(words)
    return [words for words in found if words]


class ParsedError(Exception):
    """The arguments were read; nothing was run."""


@pytest.fixture
def parse_only(monkeypatch):
    """Parsers read their arguments and stop there."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> Any:
        read(self, *given)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def parse(words: list[str], monkeypatch) -> None:
    """Ends with ParsedError if our command reads these words; SystemExit if its parser refuses them."""
    name, *rest = words
    if name == "rrepa-lab":
        main(rest)
    elif rest[0] == "-m":
        monkeypatch.setattr(sys, "argv", rest[1:])
        importlib.import_module(rest[1]).main()
    else:
        monkeypatch.setattr(sys, "argv", rest)
        runpy.run_path(str(ROOT / rest[0]), run_name="__main__")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, parse_only, monkeypatch):
    found = commands(page)
    assert found
    for words in found:
        if words[0] in OTHERS:
            continue
        assert words[0] in {"rrepa-lab", "python"}, words
        with pytest.raises(ParsedError):
            parse(words, monkeypatch)


def test_a_flag_that_does_not_exist_is_noticed(parse_only, monkeypatch, capsys):
    for words in (["rrepa-lab", "train", "digits-none", "--nothing"], ["python", "-m", "rrepa_lab.studies.reading", "nothing"]):
        with pytest.raises(SystemExit):
            parse(words, monkeypatch)
    assert "nothing" in capsys.readouterr().err


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert tuple(names["x"].shape) == (360, 1, 8, 8)
    assert list(names["out"].states) == [f"block.{t}.out" for t in (1, 2, 3, 4)]


@pytest.mark.slow
def test_the_instruments_of_the_course_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("notebooks/README.md", "python")
    exec(compile(block, "notebooks/README.md", "exec"), {})


@pytest.mark.slow
def test_the_endpoints_answer_as_shown(monkeypatch, tmp_path, page):
    import rrepa_lab as rl
    from rrepa_lab.viz.images import picture

    monkeypatch.chdir(tmp_path)
    picture(rl.load("digits-none").data("test", 1).x[0], scale=8).save("digit.png")
    (block,) = blocks("app/README.md", "python")
    assert "http://127.0.0.1:7860" in block
    names: dict[str, Any] = {}
    exec(compile(block.replace("http://127.0.0.1:7860", page), "app/README.md", "exec"), names)
    assert {"answer", "strip", "facts"} <= names.keys()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_linked_file_exists(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_every_module_and_path_named_exists(page):
    text = text_of(page)
    for name in re.findall(r"\brrepa_lab(?:\.[a-z_]+)+\b", text):
        assert importlib.util.find_spec(name), name
    for path in re.findall(r"`((?:rrepa_lab|app|assets|tests|notebooks)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_has_the_command_of_ci():
    lines = text_of("README.md").splitlines()
    assert len(lines) < 150
    assert [line for line in lines if re.fullmatch(r"pip install .*&& pytest", line)] == ['pip install -e ".[dev]" && pytest']


def test_every_mark_in_the_readme_is_one_of_the_suite():
    import tomllib

    settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    marks = {line.partition(":")[0] for line in settings["markers"]}
    (line,) = [line for line in text_of("README.md").splitlines() if "pytest -m" in line]
    assert set(re.findall(r"`(?:pytest -m )?(\w+)`", line)) == marks


def test_the_citation_is_a_citation_file():
    (block,) = blocks("README.md", "yaml")
    citation = yaml.safe_load(block)
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert [reference["url"] for reference in citation["references"]] == [
        "https://arxiv.org/abs/2511.22345", "https://arxiv.org/abs/2412.06329",
    ]  # fmt: skip
    assert all(author["name"] for reference in citation["references"] for author in reference["authors"])
