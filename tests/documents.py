"""The documents as the tests read them: the repository's Markdown files and the SQL questions in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}


def sql_questions(document: str) -> dict[str, str]:
    """Question to query: each bold line of the document that an SQL block follows."""
    return dict(re.findall(r"^\*\*(.+?)\*\*\n```sql\n(.*?)\n```$", DOCUMENTS[document], re.M | re.S))


QUESTIONS = sql_questions("docs/questions.md")


def transitions() -> dict[str, set[tuple[str, str]]]:
    """The state diagram of ARCHITECTURE.md, for each kind in it (clip …): (from, to); "" is not to be there yet."""
    (diagram,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", DOCUMENTS["ARCHITECTURE.md"], re.S)
    found: dict[str, set[tuple[str, str]]] = {}
    for before, kind, after in re.findall(r"^ +(\[\*\]|\w+) --> ([a-z]+)_(\w+): \S", diagram, re.M):
        found.setdefault(kind, set()).add(("" if before == "[*]" else before.removeprefix(f"{kind}_"), after))
    return found
