"""One HTML file that needs nothing but itself: what our pages have in common.

What a page shows is hostile: in HTML it is escaped by whoever writes it there, data are JSON in which no tag can begin,
and the page's content security policy lets no other script, style or request in than the ones written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any


def base_style() -> str:
    """The style that all pages begin with: colours in light and dark, type, the head, sections, tables."""
    return resources.files("shared").joinpath("page.css").read_text(encoding="utf-8")


def assemble(template: str, parts: Mapping[str, str], *, style: str, script: str) -> str:
    """The template with `{{name}}` replaced by the part of that name, which is HTML already. Beside `parts` there are
    `style`, `script`, and `policy`, which lets no other style and script in than these two."""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    whole = {**parts, "policy": escape(policy), "style": style, "script": script}
    # In one pass: what a part says of braces is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: whole[found[1]], template)


def _sha256(text: str) -> str:
    """A script or style as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no tag, comment or entity can begin in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
