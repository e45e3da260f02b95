"""The page to drop photos on: one document that loads nothing from elsewhere, and may not."""

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Self

from starlette.responses import HTMLResponse

from vitft.io.pages import shared_style


@dataclass(frozen=True)
class Page:
    """The document, and a policy that lets it run its own script and style, and talk to its own server only."""

    html: str
    policy: str

    @classmethod
    def load(cls) -> Self:
        """Put the page together."""
        style, script = shared_style() + _text("page.css"), _text("page.js")
        html = _text("page.html").replace("/* page.css */", style).replace("/* page.js */", script)
        policy = {
            "default-src": "'none'", "script-src": _hash(script), "style-src": _hash(style), "img-src": "data: blob:",
            "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        }  # fmt: skip
        return cls(html, "; ".join(f"{name} {value}" for name, value in policy.items()))

    def response(self) -> HTMLResponse:
        """The page as an answer."""
        return HTMLResponse(self.html, headers={"Content-Security-Policy": self.policy})


def _text(name: str) -> str:
    return files("vitft.serving").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
