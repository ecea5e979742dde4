"""`python -m docs.generate`: write the generated parts of docs/reference anew, from the code.

A part lies between `<!-- generated: NAME -->` and `<!-- end -->`; everything around it is written by hand.
"""

import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from starlette.testclient import TestClient

from api import metrics
from api.app import create_app
from api.http.errors import status_of
from api.store_metrics import StoreMetrics
from cli.main import main as temper
from store import errors
from store.engine import connect
from store.settings import Settings
from trainer.jobs.statistics import Statistics
from trainer.spec import OPTIONS, SEARCHED, Spec

REFERENCE = Path(__file__).parent / "reference"
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
PROCESSES = {
    "gateway": "api.__main__", "worker": "trainer.worker.loop", "model-server": "serving.__main__",
    "mirror": "serving.mirror", "load": "load.command",
}  # fmt: skip
Schema = Mapping[str, Any]


def table(*header: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines: list[tuple[str, ...]] = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def code(value: Any) -> str:
    """A value as JSON has it, as code."""
    if isinstance(value, bool) or value is None:
        value = {True: "true", False: "false", None: "null"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def settings() -> str:
    """Every variable with its default and description."""
    rows = [
        (
            f"`TEMPER_{name.upper()}`",
            "" if field.default in (None, "") else f"`{field.default}`",
            f"{field.description}",
        )
        for name, field in Settings.model_fields.items()
    ]
    return table("variable", "default", "meaning", rows=rows)


def spec() -> str:
    """Every field of the spec, and of the objects in it, with default, values and description."""
    schema = Spec.model_json_schema()
    parts = [_fields(schema, Spec, auto=SEARCHED)]
    for name, inner in schema["$defs"].items():
        if "properties" in inner:
            text = inner["description"].replace(" * ", " · ").replace("A B", "A·B")
            parts.append(f"### {name}\n\n{text}\n\n{_fields(inner, None)}")
    return "\n".join(parts)


def _fields(schema: Schema, model: type[BaseModel] | None, auto: tuple[str, ...] = ()) -> str:
    rows = []
    for name, field in schema["properties"].items():
        default = code(_shown(field["default"])) if "default" in field else "required"
        values = _values(field) + (', or `"auto"`' if name in auto else "")
        if model and name in OPTIONS:
            default = "`null`, the defaults below"
        rows.append((f"`{name}`", default, values, field.get("description", "")))
    return table("field", "default", "values", "meaning", rows=rows)


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(repr, value))}]".replace("'", '"')
    return value


def _values(field: Schema) -> str:
    """The values that a field takes, in words."""
    for several in ("anyOf", "oneOf"):
        if several in field:
            return ", or ".join(dict.fromkeys(_values(one) for one in field[several]))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    match field.get("type"):
        case "array":
            return f"a list of {_values(field['items'])}"
        case "object":
            return "an object"
        case "boolean":
            return "`true`, `false`"
        case "null":
            return "`null`"
        case "number" | "integer" as kind:
            return {"number": "a number", "integer": "an integer"}[kind] + _bounds(field)
    return "a text"


def _bounds(field: Schema) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    found = [f"{word} {field[name]:g}" for name, word in words.items() if name in field]
    return " " + ", ".join(found) if found else ""


def classes_of_errors() -> Iterator[type[errors.TemperError]]:
    """Every error, each after the one that it is a kind of."""
    kinds = [errors.TemperError]
    while kinds:
        kind = kinds.pop(0)
        yield kind
        kinds = [one for one in kind.__subclasses__() if one.__module__ == errors.__name__] + kinds


def every_error() -> str:
    """Code, status, cause and cure of every error."""
    rows = []
    for kind in classes_of_errors():
        status = "in a job" if issubclass(kind, errors.JobFailed) else str(status_of(kind("")))
        rows.append((f"`{kind.code}`", status, _paragraph(kind.__doc__), kind.cure))
    code, status, _, cure = rows.pop(0)
    rows.append((code, status, "None of the above: something that Temper does not foresee.", cure))
    return table("code", "status", "cause", "cure", rows=rows)


def _paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def every_metric() -> str:
    """Name, type, labels and meaning of every metric."""
    ours = [found for found in vars(metrics).values() if isinstance(found, MetricWrapperBase)]
    rows: dict[str, tuple[str, Sequence[str], str]] = {}
    for metric in ours:
        (described,) = metric.describe()
        rows[described.name] = (described.type, metric._labelnames, described.documentation)
    with tempfile.TemporaryDirectory() as folder:
        engine = connect(f"sqlite:///{folder}/temper.db")
        shared = list(StoreMetrics(Statistics(engine)).registry.collect())
        engine.dispose()
    for one in shared:
        labels = dict.fromkeys(label for sample in one.samples for label in sample.labels if label != "le")
        rows[one.name] = (one.type, tuple(labels), one.documentation)
    lines = []
    for name, (kind, names, text) in sorted(rows.items()):
        full = f"{name}_total" if kind == "counter" else name
        lines.append((f"`{full}`", kind, ", ".join(f"`{label}`" for label in names), text))
    return table("metric", "type", "labels", "meaning", rows=lines)


def commands() -> str:
    """Every command with its arguments and options."""
    context = click.Context(temper, info_name="temper")
    return f"Before the command:\n\n{_options(temper, context)}\n" + "\n".join(_command(temper, context))


def _command(group: click.Group, context: click.Context) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        if name in PROCESSES:
            shown = process(name)
            text = f"{command.help} {_paragraph(shown.help)}"
        else:
            shown, text = command, command.help or ""
        inner = click.Context(shown, info_name=name, parent=context)
        usage = " ".join([inner.command_path, *shown.collect_usage_pieces(inner)])
        paragraphs = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
        yield f"### {inner.command_path}\n\n`{usage}`\n\n{_linked(paragraphs)}\n\n{_options(shown, inner)}"
        if isinstance(command, click.Group):
            yield from _command(command, inner)


def process(name: str) -> click.Command:
    """The command to which `temper gateway` and the like pass their options on."""
    found: click.Command = importlib.import_module(PROCESSES[name]).main
    return found


def _options(command: click.Command, context: click.Context) -> str:
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and record[1] and "--help" not in record[0]:
            usage = re.sub(r"\[.*?\]", lambda found: found[0].replace("|", ", "), record[0]).replace("|", " or ")
            rows.append((f"`{usage}`", _linked(" ".join(record[1].split()))))
    return table("option", "meaning", rows=rows) if rows else ""


def _linked(text: str) -> str:
    """Text in which brackets are no links."""
    return text.replace("[", "\\[")


def _sentence(text: str) -> str:
    """The first sentence of a description, in one line."""
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", _paragraph(text), maxsplit=1)[0]


def routes() -> str:
    """Every route with what it does in a line."""
    document = openapi()
    rows = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            rows.append((f"`{method.upper()} {path}`", _sentence(operation["description"])))
    return table("route", "what it does", rows=rows)


def openapi() -> dict[str, Any]:
    """The OpenAPI document of a gateway without a model server."""
    with tempfile.TemporaryDirectory() as home:
        app = create_app(Settings(home=Path(home), model_server="127.0.0.1:1"))
        with TestClient(app, base_url="http://localhost") as api:
            document: dict[str, Any] = api.get("/openapi.json").json()
    return document


GENERATED: Mapping[str, Callable[[], str]] = {
    "settings": settings, "spec": spec, "errors": every_error, "metrics": every_metric, "cli": commands, "http": routes
}  # fmt: skip


def generated(text: str) -> str:
    """A page with its generated parts as the code has them now."""
    return PART.sub(lambda found: f"{found[1]}\n{GENERATED[found[2]]()}\n{found[3]}", text)


@click.command()
def main() -> None:
    """Write the generated parts of docs/reference anew."""
    for path in sorted(REFERENCE.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = generated(before)
        path.write_text(after, encoding="utf-8")
        click.echo(f"{path.name}: {'as before' if after == before else 'written'}")


if __name__ == "__main__":
    main()
