"""The page of a flow run in the Prefect UI: its artifacts and its log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run as this_run

WAITS = ("Late", "AwaitingConcurrencySlot")  # states of a run that was asked for and not begun


class PrefectPage:
    """The page of a flow run, by default of the one that it is made in. Raises the errors of Prefect's client.

    Everything is changed in place, also what an earlier process of the same run has shown: a new artifact would be one
    more card on the page.
    """

    def __init__(self, flow_run: FlowRun | None = None, *, web: str | None = None) -> None:
        """web: address of the service that shows clips, where there is one."""
        self.web = web
        self.log = get_run_logger() if flow_run is None else flow_run_logger(flow_run)
        self.run_id = UUID(str(this_run.id)) if flow_run is None else flow_run.id
        self.shown: dict[str, UUID] = {}

    def info(self, message: str) -> None:
        self.log.info("%s", message)

    def warn(self, message: str) -> None:
        self.log.warning("%s", message)

    def suspended(self) -> bool:
        """True once the server has said that the run is suspended. Of the run that it is asked in alone."""
        context = FlowRunContext.get()
        return context is not None and context.flow_run_suspension_request.is_requested()

    def begun_by(self) -> str | None:
        """The state by which the run was asked to begin: Scheduled at first, Resuming and AwaitingRetry by buttons."""
        with get_client(sync_client=True) as client:
            states = sorted(client.read_flow_run_states(self.run_id), key=lambda state: state.timestamp)
        begun = [
            state.name for state in states if not (state.is_running() or state.is_pending() or state.name in WAITS)
        ]
        return begun[-1] if begun else None

    def settle(self, state: State[Any]) -> None:
        """Gives the run a state, unless it is to begin again. So one that was suspended is so for as long as one likes.

        The UI suspends for five minutes, after which Prefect calls a run failed.
        """
        with get_client(sync_client=True) as client:
            now = client.read_flow_run(self.run_id).state
            if now is not None and (now.is_scheduled() or now.is_pending()):
                return
            client.set_flow_run_state(self.run_id, state, force=True)

    def resume(self) -> None:
        """Does what the button Resume does."""
        with get_client(sync_client=True) as client:
            client.resume_flow_run(self.run_id)

    def leave(self) -> NoReturn:
        """Ends this process and leaves the run's state as it is."""
        raise Pause

    def markdown(self, key: str, text: str, description: str | None = None) -> None:
        self._show("markdown", key, text, description)

    def image(self, key: str, address: str, description: str) -> None:
        self._show("image", key, address, description)

    def progress(self, key: str, percent: float, description: str) -> None:
        self._show("progress", key, percent, description)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
        self._show("table", key, json.dumps([dict(row) for row in rows]), description)

    def _show(self, kind: str, key: str, data: str | float, description: str | None) -> None:
        with get_client(sync_client=True) as client:
            artifact = self.shown.get(key) or self._find(client, key)
            if artifact is None:
                new = ArtifactCreate(key=key, type=kind, data=data, description=description, flow_run_id=self.run_id)
                self.shown[key] = client.create_artifact(new).id
                return
            self.shown[key] = artifact
            client.update_artifact(artifact, ArtifactUpdate(data=data, description=description))

    def _find(self, client: SyncPrefectClient, key: str) -> UUID | None:
        """The artifact that the run has under this key."""
        own = ArtifactFilter(key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[self.run_id]))
        found = client.read_artifacts(artifact_filter=own, sort=ArtifactSort.UPDATED_DESC, limit=1)
        return found[0].id if found else None
