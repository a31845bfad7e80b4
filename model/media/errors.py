"""How media from outside fail."""

from __future__ import annotations


class BadMedia(ValueError):
    """The bytes are no picture or video that can be used. The message says why, in words that follow a file's name."""
