"""Addresses at which people look at clips and requests: those of the service in `flows.web.app`."""

from __future__ import annotations

from dataclasses import dataclass

EXTENSION = {"video/mp4": "mp4", "image/png": "png"}  # of a clip's file, by its media type


@dataclass(frozen=True, slots=True)
class Links:
    """Makes addresses below that of the service; each is None where none is known."""

    web: str | None

    def clip(self, clip_id: str, media_type: str | None = None) -> str | None:
        """The address at which a clip plays; without a media type the one that leads to all there is of it."""
        ending = EXTENSION.get(media_type or "")
        return self._below(f"clips/{clip_id}.{ending}" if ending else f"clips/{clip_id}")

    def facts(self, clip_id: str) -> str | None:
        """The address of everything that history says of a clip, as JSON."""
        return self._below(f"clips/{clip_id}.json")

    def manifest(self, request_id: str) -> str | None:
        """The address of a request's manifest, a line a clip; while clips are made, of those lines as they are now."""
        return self._below(f"requests/{request_id}/manifest.jsonl")

    def sheet(self, request_id: str) -> str | None:
        """The address of a request's contact sheet."""
        return self._below(f"requests/{request_id}/contact_sheet.png")

    def _below(self, path: str) -> str | None:
        return None if self.web is None else f"{self.web}/{path}"


NO_LINKS = Links(None)
