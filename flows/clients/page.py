"""The page of a flow run in the Prefect UI: its artifacts and its log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate


class PrefectPage:
    """The page of the flow run that it is made in. Raises the errors of Prefect's client."""

    def __init__(self) -> None:
        self.log = get_run_logger()
        self.shown: dict[str, Any] = {}  # what is changed in place: a new artifact would be one more card on the page

    def info(self, message: str) -> None:
        self.log.info("%s", message)

    def warn(self, message: str) -> None:
        self.log.warning("%s", message)

    def markdown(self, key: str, text: str, description: str | None = None) -> None:
        if key in self.shown:
            self._change(key, text, description)
        else:
            self.shown[key] = create_markdown_artifact(text, key=key, description=description)

    def image(self, key: str, address: str, description: str) -> None:
        create_image_artifact(address, key=key, description=description)

    def progress(self, key: str, percent: float, description: str) -> None:
        if key in self.shown:
            update_progress_artifact(self.shown[key], percent)
        else:
            self.shown[key] = create_progress_artifact(percent, key=key, description=description)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
        table = [dict(row) for row in rows]
        if key in self.shown:
            self._change(key, json.dumps(table), description)
        else:
            self.shown[key] = create_table_artifact(table, key=key, description=description)

    def _change(self, key: str, data: str, description: str | None) -> None:
        with get_client(sync_client=True) as client:
            client.update_artifact(self.shown[key], ArtifactUpdate(data=data, description=description))
