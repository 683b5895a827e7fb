"""Self-contained HTML pages: templates, with the styles and the script of the charts embedded in the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from unified_lm.core.version import code_version

_PARTS = {"theme_css": "theme.css", "charts_css": "charts.css", "charts_js": "charts.js", "report_css": "report.css"}


def page(template: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Render a template of this folder.

    Args:
        template: its file name. It may use the variables `theme_css`, `charts_css`, `charts_js` and `report_css`.
        filters: further filters for the template.
        values: further variables for the template; text is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    parts = {name: Markup(_read(file)) for name, file in _PARTS.items()}
    return environment.get_template(template).render(**parts, **values)


def page_data(value: Any) -> Markup:
    """JSON for a script element of a page. "</" would end the element; the escaped form means the same in JSON."""
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def made_by() -> str:
    """Name and version of the program, for the footer of a page."""
    return f"unified_lm {code_version()['unified_lm']}"


@cache
def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
