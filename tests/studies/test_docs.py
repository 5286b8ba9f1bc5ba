"""README.md and docs/ hold what they promise: sizes, links, names, and tables of stored scores."""

import re
from pathlib import Path

import pytest

from support import config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "configs/README.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def split(page):
    """Return (prose, code): a page's text outside and inside of its fenced blocks."""
    parts = re.split(r"^```.*\n", page.read_text(), flags=re.M)
    assert len(parts) % 2, f"{page} has an open code block"
    return "\n".join(parts[::2]), "".join(parts[1::2])


def test_the_readme_begins_with_commands_and_says_how_to_test():
    lines = README.read_text().splitlines()
    assert sum(line.startswith("```") for line in lines[:20]) == 2
    assert re.search(r"^pip install -r requirements.txt && pytest", split(README)[1], re.M)


@every_page
def test_paragraphs_are_short(page):
    prose, code = split(page)
    assert max(map(len, code.splitlines()), default=0) <= 120
    for paragraph in re.split(r"\n\n|\n(?=- |\d+\. |#|!|\|)", prose):
        if not paragraph.lstrip().startswith(("|", "!", "#")):
            lines = paragraph.strip().splitlines()
            assert len(lines) <= 6 and max(map(len, lines), default=0) <= 100, paragraph
    for table in re.findall(r"(?:^\|.*\n)+", prose, re.M):
        head, bar, *rows = (line.count("|") for line in table.splitlines())
        assert table.splitlines()[1].startswith("|---") and {bar, *rows} == {head}, table


@every_page
def test_no_number_is_still_to_be_measured(page):
    assert re.findall(r"\[\[.*?\]\]", page.read_text(), re.S) == []


@every_page
def test_links_to_sections_lead_somewhere(page):  # those to files: test_house.py
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", split(page)[0]):
        file = page.parent / name if name else page
        titles = re.findall(r"^#+ (.*)", file.read_text(), re.M)
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in slugs, anchor


@every_page
def test_what_is_named_exists(page):
    text = page.read_text()
    for name in set(re.findall(r"python -m (studies\.\w+)", text)) - {"studies.NAME"}:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    for name in re.findall(r"(?:`|python |torchrun |/)([\w/]+\.(?:py|yaml))\b", text):
        folders = (ROOT, ROOT / "configs", ROOT / "extensions", ROOT / "studies", ROOT / "support")
        placeholder = name.endswith("NAME.yaml")
        assert placeholder or any((folder / name).exists() for folder in folders), name
    keys = config.flat(config.load(ROOT / "config.yaml"))
    sections = "data|tokenizer|model|train|sample|choice"
    for name in re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z_]+)\b", text):
        file = name.split(".")[1] in ("py", "yaml", "md", "json", "png", "pt")
        assert file or name in keys, name
    for name, objects in re.findall(r"`(\w+\.py): ([\w, .]+)`", text):
        for item in objects.split(", "):
            last = item.split(".")[-1]
            assert re.search(rf"(def|class) {last}\b", (ROOT / name).read_text()), item


def rows_below(page, title):
    section = page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [cells(line) for line in section.splitlines() if line.startswith("| ")]
    return rows[1:]  # below the head


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    "page, title, stored",
    [
        ("README.md", "Results", "pushing"),
        ("docs/RESULTS.md", "The built-in world", "pushing"),
        ("docs/RESULTS.md", "Doom", "doom"),
        ("docs/CHOICE.md", "Scores", "pushing"),
    ],
)
def test_tables_are_those_of_the_stored_scores(page, title, stored):
    table = (ROOT / f"results/evidence/{stored}.md").read_text().splitlines()
    known = [cells(line) for line in table if line.startswith("| ")]
    rows = rows_below(ROOT / page, title)
    assert len(rows) > 5
    for arm, *scores in rows:  # columns may be left out, never changed
        found = [row for row in known if row[0] == arm]
        assert any(is_subsequence(scores, row[1:]) for row in found), (arm, scores)


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(item in rest for item in part)


def test_the_lengths_in_the_readme_are_about_those_of_the_files():
    listed = re.findall(r"^([\w.]+(?:/[\w.]*)?) +([\d,]+)  ", split(README)[1], re.M)
    assert len(listed) > 8
    for name, length in listed:
        path = ROOT / name
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        there = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(there - int(length.replace(",", ""))) <= 0.05 * there + 5, (name, there)
