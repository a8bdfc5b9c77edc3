"""An OpenAPI document as one HTML page, which loads nothing: it is read without a network, too.

It shows what `openapi.build()` makes, and not everything that OpenAPI knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any, Final

Json = Any

_CODE = re.compile(r"`([^`]+)`")
_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { background: #8881; padding: .6rem; overflow-x: auto; border-radius: .3rem; margin: .3rem 0; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
h3 { margin-top: 2rem; font-family: ui-monospace, monospace; font-size: 1rem; }
h3 b { display: inline-block; min-width: 4.5rem; }
h4 { margin: .8rem 0 .2rem; font-size: .95rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; }
tr { border-top: 1px solid #8883; }
nav li { list-style: none; }
nav ul { padding-left: 0; }
"""


def to_html(document: Mapping[str, Json]) -> str:
    """The page."""
    info = document["info"]
    title = escape(info["title"])
    body = [
        f"<h1>{title}</h1>",
        _text(info["description"]),
        f"<p>Version {escape(info['version'])}. "
        '<a href="/swagger.yml">This description as OpenAPI</a></p>',
        *_contents(document),
    ]
    for tag in document["tags"]:
        body += [f"<h2>{escape(tag['name'])}</h2>", _text(tag["description"])]
        for path, method, operation in _operations(document):
            if tag["name"] in operation["tags"]:
                body += _operation(document, path, method, operation)
    body.append("<h2>Objects</h2>")
    for name, schema in document["components"]["schemas"].items():
        body += [f'<h3 id="{_anchor(name)}">{escape(name)}</h3>', *_schema(schema)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _operations(document: Mapping[str, Json]) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def _contents(document: Mapping[str, Json]) -> Iterator[str]:
    yield "<nav><ul>"
    for path, method, operation in _operations(document):
        yield (
            f'<li><a href="#{_anchor(f"{method} {path}")}"><code>{method} {escape(path)}</code></a>'
            f" {escape(operation['summary'])}</li>"
        )
    yield "</ul></nav>"


def _operation(
    document: Mapping[str, Json], path: str, method: str, operation: Mapping[str, Json]
) -> Iterator[str]:
    yield f'<h3 id="{_anchor(f"{method} {path}")}"><b>{method}</b> {escape(path)}</h3>'
    yield _text(operation["summary"] + ".")
    yield _text(operation.get("description", ""))
    if "security" in document:
        needs_none = operation.get("security") == []
        yield "<p>It never needs a token.</p>" if needs_none else ""
    if parameters := operation.get("parameters"):
        yield "<h4>Parameters</h4>" + _table(map(_parameter, parameters))
    if body := operation.get("requestBody"):
        yield "<h4>Body</h4>"
        yield from _content(body["content"])
    shared = document["components"]["responses"]
    responses = [
        (status, shared[response["$ref"].rpartition("/")[2]] if "$ref" in response else response)
        for status, response in operation["responses"].items()
    ]
    yield "<h4>Answers</h4>" + _table(
        (f"<code>{status}</code>", _text(x["description"]) + "".join(_content(x["content"])))
        for status, x in responses
    )


def _parameter(parameter: Mapping[str, Json]) -> tuple[str, ...]:
    place = parameter["in"] if parameter.get("required") else f"{parameter['in']}, optional"
    example = parameter.get("example")
    shown = f"<pre>{escape(str(example))}</pre>" if example not in (None, "") else ""
    return (
        f"<code>{escape(parameter['name'])}</code>",
        escape(place),
        _text(parameter["description"]) + shown,
    )


def _content(content: Mapping[str, Json]) -> Iterator[str]:
    for media_type, media in content.items():
        kind = "" if media_type == "application/json" else f", {escape(media_type)}"
        schema = _type(media["schema"])
        if schema:
            yield f"<p>{schema}{kind}</p>"
        examples = [x["value"] for x in media.get("examples", {}).values()]
        for example in [media["example"]] if "example" in media else examples:
            text = example if kind else json.dumps(example, indent=None if examples else 2)
            yield f"<pre>{escape(text)}</pre>"


def _schema(schema: Mapping[str, Json]) -> Iterator[str]:
    yield _text(schema.get("description", ""))
    properties = schema.get("properties")
    if not properties:
        yield f"<p>{_type(schema)}</p>"
        return
    required = schema.get("required", ())
    yield _table(
        (
            f"<code>{escape(name)}</code>",
            _type(item) + ("" if name in required else ", optional"),
            _text(item.get("description", "")),
        )
        for name, item in properties.items()
    )


def _type(schema: Mapping[str, Json]) -> str:
    """A few words on what a value is; with a link where it has a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{_anchor(name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    kinds = schema.get("type", "any value")
    words = " or ".join(kinds if isinstance(kinds, list) else [kinds])
    if "items" in schema:
        words += f" of {_type(schema['items'])}"
    return words


def _table(rows: Iterable[Iterable[str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{''.join(lines)}</table>"


def _text(text: str) -> str:
    """Paragraphs, with `code` between backquotes."""
    paragraphs = [escape(part.strip()) for part in text.split("\n\n") if part.strip()]
    marked = (_CODE.sub(r"<code>\1</code>", part) for part in paragraphs)
    return "".join(f"<p>{part}</p>" for part in marked)


def _anchor(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
