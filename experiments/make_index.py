"""Write the index of README.md, from the comments at the head of every YAML.

    python experiments/make_index.py

A YAML begins with `# PAPER, TABLE: ROW`; of its commands, comments that begin with `# genseg`, the
index shows the first one that names the file.
"""

import re
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- index, by make_index.py -->\n", "<!-- end of the index -->\n"


def entry(path):
    """Paper, table, row, the file's name and its command."""
    name = str(path.relative_to(HERE))
    head = re.match(r"(#.*\n)+", path.read_text())
    text = head[0].replace("\\\n#", "") if head else ""
    title = re.match(r"# ([^,:]+), ([^:]+): (.+)\n", text)
    commands = re.findall(r"^# (genseg .+)$", text, re.MULTILINE)
    command = next((c for c in commands if f"experiments/{name}" in c.split()), None)
    if title is None or command is None:
        raise SystemExit(
            f"experiments/{name}: begin with '# PAPER, TABLE: ROW' and a command, "
            f"'# genseg ... --config experiments/{name} ...'."
        )
    return *title.groups(), name, " ".join(command.split())


def place(entry):
    """Tables by number; what is in none comes last."""
    _, table, _, name, _ = entry
    number = re.search(r"\d+", table) if table.startswith("Table") else None
    return (int(number[0]) if number else 99, table, name)


def index():
    """All tables."""
    entries = [entry(path) for path in HERE.rglob("*.yaml")]
    lines = []
    for paper in sorted({paper for paper, *_ in entries}):
        lines += [
            f"### Index: {paper}",
            "",
            "| table | row | YAML | command |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {table} | {row} | [`{name}`]({name}) | `{command}` |"
            for _, table, row, name, command in sorted(
                (e for e in entries if e[0] == paper), key=place
            )
        ]
        lines.append("")
    return "\n".join(lines)


def with_index(readme):
    """The README with its index renewed."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{index()}\n{END}{after}"


if __name__ == "__main__":
    README = HERE / "README.md"
    README.write_text(with_index(README.read_text()))
