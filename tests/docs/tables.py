"""`python -m tests.docs.tables` writes the settings table of the README anew from `store.settings.Settings`."""

from pathlib import Path

import click

from store.settings import Settings

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- settings: written by `.venv/bin/python -m tests.docs.tables` -->\n", "<!-- end of settings -->\n"


def settings_table() -> str:
    """Every variable with its default and description, in Markdown."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        lines.append(f"| `TEMPER_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


@click.command()
def main() -> None:
    """Write the settings table of the README anew."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{settings_table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
