"""The page at `/`: one file, and the policy by which a browser runs nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

HTML = files("squat.serving").joinpath("page.html").read_text("utf-8")


def _hashes(tag: str) -> str:
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src data:",  # the icon, which is empty
            f"style-src {_hashes('style')}",
            f"script-src {_hashes('script')}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
