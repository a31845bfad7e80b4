"""From a store's URL to a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from infra.store.contract import Store
from infra.store.folder import FolderStore
from infra.store.s3 import S3Store


def open_store(
    url: str,
    access_key: str | None = None,
    secret_key: str | None = None,
    again: Callable[[], tuple[str, str]] | None = None,
) -> Store:
    """The store a URL names; nothing is contacted yet. again: both keys as they are now, asked for at every request.

    `file:///srv/rushes`, or `s3://bucket?endpoint=host:port` with, when wanted, `&secure=false` (plain HTTP),
    `&region=…` (where the endpoint's name does not say it), and `&public=https://…` (the address under which browsers
    reach the endpoint, with a path if a proxy has one, for signed links).
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError(f"store URL {url!r} must name an absolute folder: file:///srv/rushes")
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme != "s3":
        raise ValueError(f"store URL scheme {parts.scheme!r} must be file or s3")
    if parts.username or parts.password:
        raise ValueError("a store URL must not carry credentials (URLs end up in logs): set the two store keys instead")
    if not parts.hostname or parts.path.strip("/"):
        raise ValueError(f"store URL {url!r} must be s3://BUCKET?endpoint=HOST:PORT, without a folder in the bucket")
    query = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
    if unknown := query.keys() - {"endpoint", "secure", "region", "public"}:
        raise ValueError(f"store URL: option {min(unknown)!r} must be one of endpoint, secure, region, public")
    if not access_key or not secret_key:
        raise ValueError(f"store {parts.hostname!r} in S3 needs an access key and a secret key")
    if query.get("secure", "true") not in ("true", "false"):
        raise ValueError(f"store URL: secure={query['secure']} must be true or false")
    return S3Store(
        query.get("endpoint", "s3.amazonaws.com"),
        access_key,
        secret_key,
        parts.hostname,
        secure=query.get("secure", "true") == "true",
        region=query.get("region"),
        public=query.get("public"),
        again=again,
    )
