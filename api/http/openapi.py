"""Parts of the API's own documentation that several routes share."""

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import BaseModel

from api.routes.schemas import Error, ModelName, PlainError

After = Annotated[str | None, Query(max_length=100, description="The last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of the page.")]
Name = Annotated[ModelName, Path()]
Number = Annotated[int, Path(ge=1, lt=2**63, description="A version.")]

TEXTS = {
    400: "The request cannot be parsed",
    404: "Unknown model, version or job",
    409: "The state does not allow it",
    413: "Too large",
    415: "Media type not supported",
    422: "Invalid content",
    429: "Too much at once",
    503: "The store or the model server is away",
    504: "The model server did not answer in time",
    507: "No space is left on the disk",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of the answers that are no success."""
    return {status: {"model": Error, "description": TEXTS[status]} for status in statuses}


PLAIN_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {"model": PlainError, "description": TEXTS[status]} for status in (400, 404, 413, 429, 503, 504)},
    "4XX": {"model": PlainError, "description": "Refused"},  # FastAPI would document a 422 of its own
}


def _in_path(name: str, about: str, kind: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": about, "schema": {"type": kind}}


# Of routes that read their request themselves.
NAME, LABEL = _in_path("name", "The model."), _in_path("label", "A label.")
VERSION = _in_path("version", "A version.", "integer")


def whole(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that its route reads itself, with nothing to look up elsewhere."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return filled(parts[node["$ref"].rpartition("/")[2]])
            return {key: filled(value) for key, value in node.items()}
        return [filled(value) for value in node] if isinstance(node, list) else node

    found: dict[str, Any] = filled(schema)
    return found
