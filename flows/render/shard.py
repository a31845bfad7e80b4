"""One leased shard: render its clips, publish each, keep the lease, leave in order."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from sqlalchemy.orm import Session

from db import artifacts
from db.artifacts import NewArtifact
from db.audit import resume_keys
from db.claim import LeasedClip
from db.fence import Lease, LeaseLost
from db.leases import (
    ResumeState,
    complete_shard,
    fail_clip,
    record_clip,
    release_shard,
    renew,
    save_resume_state,
    start_clip,
)
from flows.clients.ledger import Ledger
from flows.clients.retry import unavailable_service, with_retry
from flows.render.clip import WrongDigest, as_file, proven, spec_of
from flows.render.worker import EngineUnfit, T, Worker, code_version, log
from infra.logs import about
from infra.store.contract import NoSuchKey
from infra.tracing import Event, OpenTrace, begin_trace, carrier, continued, span_between
from model.engine.clip import (
    ClipSpec,
    DeviceFailed,
    OutOfMemory,
    RankDied,
    RankHung,
    RenderedClip,
    RenderFailed,
    SavedState,
)
from model.media.errors import BadMedia

BEAT = 1.0  # seconds between two renewals of a lease: also how soon a cancelled clip is noticed
LOOK = 2  # beats between two looks whether work of a higher priority waits
KEEPING = 8.0  # seconds that an engine that is told to stop has to keep what it is at
AT_ONCE = 0.25  # seconds in which small clips are published: not worth a second lease, and in the order of their turns
IN_A_ROW = 3  # clips that fail with none made between, after which an engine looks whether it can render at all
HEARD = 1.0  # seconds of a wait: a signal that comes as one begins interrupts no lock, and is heard when it ends
ENDING = 3.0  # seconds in which work comes to an end whose ranks are gone


@dataclass(slots=True)
class Shard:
    """One leased shard, from claim to completion."""

    worker: Worker
    lease: Lease
    clips: Sequence[LeasedClip]
    cancelled: set[str] = field(default_factory=set[str])
    lost: LeaseLost | None = None
    outranked: bool = False  # it is to give way
    paused: bool = False  # its request is
    stopped: bool = False  # the engine was told to stop
    started: dict[str, int] = field(default_factory=dict[str, int])  # the numbers of the attempts
    settled: set[str] = field(default_factory=set[str])  # recorded, failed or cancelled
    doubtful: dict[str, tuple[str, Exception]] = field(default_factory=dict[str, tuple[str, Exception]])  # failed
    span: dict[str, str] = field(default_factory=dict[str, str])  # the carrier of the shard's span
    traces: dict[str, OpenTrace] = field(default_factory=dict[str, OpenTrace])  # of its clips' attempts
    began: float = field(default_factory=time.time)
    finished: int = 0
    saving: dict[str, Future[None]] = field(default_factory=dict[str, "Future[None]"])  # of each clip the last one
    objects: set[str] = field(default_factory=set[str])  # checkpoints that there may be of its clips
    working: Future[int] | None = None
    told: int = 0  # clips that were finished when `run` returned
    rendered: threading.Event = field(default_factory=threading.Event)  # the ranks are free for another shard
    over: threading.Event = field(default_factory=threading.Event)  # the lease is not renewed any more
    keeper: threading.Thread | None = None  # renews it
    free_since: float | None = None  # the time from which on they were

    def run(self) -> int:
        """Renders the clips and records them; returns how many were finished. A lost lease ends it without a word.

        Returns as soon as the ranks are free: the last clips may still be published then, for which `finish` waits.
        That happens in a thread of its own. What a signal raises (SystemExit, KeyboardInterrupt, what Prefect makes of
        SIGTERM) is raised here, where nothing is interrupted by it. Clips under way are then kept at their next step,
        for at most `KEEPING` seconds; a second signal ends that too.
        """
        hand = ThreadPoolExecutor(1, thread_name_prefix="shard")
        self.working = working = hand.submit(copy_context().run, self.work)
        working.add_done_callback(lambda _: self.rendered.set())
        try:
            while not self.rendered.wait(HEARD):
                pass
            wait((working,), AT_ONCE)
        except BaseException:
            try:
                self.stopped = True
                wait((working,), KEEPING)
            finally:
                if not working.done():
                    self.abandon(working)
            raise
        finally:
            hand.shutdown(wait=False)
        self.told = working.result() if working.done() else self.finished
        return self.told

    def published(self, seconds: float) -> bool:
        """True when the last clip is published and the lease is over, or is so within these seconds."""
        return self.working is None or bool(wait((self.working,), seconds).done)

    def finish(self) -> int:
        """Waits until the last clip is published and the lease is over; returns how many were finished since `run`."""
        while not self.published(HEARD):
            pass
        return (self.working.result() if self.working else self.finished) - self.told

    def hurry(self) -> None:
        """Ends what is still being published, since the engine ends: in a moment, or it goes back with the shard."""
        if not self.published(ENDING):
            self.lost = LeaseLost(f"shard {self.lease.shard_id}: the engine had no time to publish its last clips")
            self.published(ENDING)
        self.let_lease_go()  # nobody asks the ledger once the engine is gone, also where the store holds the work up
        self.give_back()

    def abandon(self, working: Future[int]) -> None:
        """Ends the work at once: the lease counts as lost and the ranks are killed."""
        self.lost = LeaseLost(f"shard {self.lease.shard_id}: the engine had no time to keep what it was at")
        self.worker.renderer.kill()
        wait((working,), ENDING)
        self.let_lease_go()

    def work(self) -> int:
        """Renders and records, as `run` says, on the thread that calls it."""
        with about(request_id=self.lease.request_id, shard_id=self.lease.shard_id):
            return self._work()

    def _work(self) -> int:
        keeping = partial(copy_context().run, self.keep_lease)
        self.keeper = threading.Thread(target=keeping, name="lease", daemon=True)
        self.keeper.start()
        try:
            with (
                continued(self.lease.carrier, "shard", shard_id=self.lease.shard_id, request_id=self.lease.request_id),
                ThreadPoolExecutor(1, thread_name_prefix="publish") as publisher,
            ):
                self.span = carrier()
                self.render_all(publisher)
            self.doubtful.clear()  # those of an engine that stops
            if self.leaves and self.left(self.clips):
                self.worker.say(f"shard {self.lease.shard_id}: {self.why_it_leaves}")
                self.worker.gave_way = self.lease.shard_id if self.outranked else None
                self.give_back()
            else:
                beside = 0.0 if self.free_since is None else time.monotonic() - self.free_since
                self.write(lambda session: complete_shard(session, self.lease, beside=beside))
        except LeaseLost as error:
            self.lost = error
            self.worker.say(f"shard {self.lease.shard_id}: {error}")
        finally:
            self.let_lease_go()
            for opened in self.traces.values():  # of clips that were cancelled, kept or lost
                opened.end(time.time())
            self.sweep()
        return self.finished

    @property
    def leaves(self) -> bool:
        """True when clips under way are to be kept, and no other begun."""
        return self.outranked or self.paused or self.stopped

    @property
    def why_it_leaves(self) -> str:
        if self.stopped:
            return "is kept, since the engine stops"
        return "is kept, since its request is paused" if self.paused else "gives way to a higher priority"

    def left(self, clips: Sequence[LeasedClip]) -> list[LeasedClip]:
        """Those still to render."""
        over = self.settled | self.cancelled | self.doubtful.keys()
        return [clip for clip in clips if clip.clip_id not in over]

    def let_lease_go(self) -> None:
        """Ends the renewing of the lease."""
        self.over.set()
        if self.keeper is not None:
            self.keeper.join(timeout=10)

    def keep_lease(self) -> None:
        """Renews the lease, learns what is cancelled or paused and who goes first; the render loop looks at that."""
        until = time.monotonic() + self.worker.settings.lease_seconds
        for beat in count(1):
            if self.over.wait(BEAT):
                return
            try:
                with self.worker.ledgers.begin() as session:
                    seconds, claimed = self.worker.settings.lease_seconds, [clip.clip_id for clip in self.clips]
                    self.cancelled |= renew(session, self.lease, seconds, claimed)
                until = time.monotonic() + self.worker.settings.lease_seconds
                if beat % LOOK == 0 and not self.leaves:
                    self.paused = self.worker.paused(self.lease)
                    self.outranked = self.worker.outranked(self.lease)
            except LeaseLost as error:
                self.lost = error
                return
            except Exception as error:
                log.warning("renewing the lease of shard %s failed: %s", self.lease.shard_id, error)
                if time.monotonic() > until:
                    self.lost = LeaseLost(
                        f"shard {self.lease.shard_id}: the ledger could not be reached for a whole lease"
                    )
                    return

    def give_back(self) -> None:
        """Another claim may have the shard at once."""
        try:
            with self.worker.ledgers.begin() as session:
                release_shard(session, self.lease)
        except LeaseLost:
            pass  # somebody has it already
        except Exception:
            log.warning("shard %s could not be given back; its lease will run out", self.lease.shard_id, exc_info=True)

    def specs(self, clips: Sequence[LeasedClip]) -> list[ClipSpec]:
        """The clips as the renderer takes them. A clip whose sources cannot be had is failed here, and left out."""
        specs: list[ClipSpec] = []
        for clip in clips:
            with about(clip_id=clip.clip_id):
                self.find_left_behind(clip)
                try:
                    specs.append(self.with_resume_state(clip, spec_of(clip, self.fetch)))
                except (BadMedia, NoSuchKey, WrongDigest) as error:
                    self.on_step(clip.clip_id, 0, clip.settings.steps)
                    mend = "" if isinstance(error, BadMedia) else ": `rushes audit --repair`, then `rushes retry`"
                    self.settle_failed(clip.clip_id, f"its source {error}{mend}", error)
        return specs

    def find_left_behind(self, clip: LeasedClip) -> None:
        """Notes every checkpoint of the clip: of an engine that was killed there may be one that no row refers to."""
        if clip.attempt_no > 1:
            try:
                self.objects |= {each.key for each in self.worker.store.list(f"checkpoints/{clip.clip_id}/")}
            except Exception as error:
                log.warning("the checkpoints of clip %s could not be listed: %s", clip.clip_id, error)

    def with_resume_state(self, clip: LeasedClip, spec: ClipSpec) -> ClipSpec:
        """The clip with what an earlier attempt left, if it can be had and comes to the same bits on this engine."""
        if clip.resume_state is None:
            return spec
        key = clip.resume_state.key
        self.objects.add(key)
        if clip.resume_state.fingerprint != self.worker.renderer.fingerprint(spec):
            log.info("clip %s begins anew: its checkpoint %s is of another kind of engine", clip.clip_id, key)
            return spec
        try:
            return replace(spec, resume_state=self.while_leased(lambda: self.worker.store.get(key)))
        except Exception as error:
            log.warning("clip %s begins anew: its checkpoint %s cannot be had (%s)", clip.clip_id, key, error)
            return spec

    def fetch(self, source: NewArtifact) -> bytes:
        """The bytes of a source, proven by their digest. Waits for the store for as long as the lease is ours."""
        return proven(self.while_leased(lambda: self.worker.store.get(source.key)), source)

    def render_all(self, publisher: ThreadPoolExecutor) -> None:
        """Every clip once. When the ranks end under some clips, these have failed; the others go on with new ranks.

        Which of them it was is unknown, so what failed before is tried again alone: a clip that ends the ranks
        costs its neighbours one attempt and no more.
        """
        fresh = [clip for clip in self.clips if clip.attempt_no == 1]
        groups = [fresh, *([clip] for clip in self.clips if clip.attempt_no > 1)]
        for some in groups:
            if not self.leaves:
                self.render_some(some, publisher, last=some is groups[-1])

    def render_some(self, clips: Sequence[LeasedClip], publisher: ThreadPoolExecutor, *, last: bool) -> None:
        """last: the ranks have nothing more to do for this shard after these clips."""
        while left := self.left(clips):
            pending: list[Future[None]] = []
            failure: Exception | None = None
            with self.worker.ranks:
                try:
                    for rendered in self.rendering(left, publisher):
                        pending.append(self.aside(publisher, self.publish, rendered, tuple(self.doubtful)))
                        pending = [f for f in pending if not f.done() or f.result()]
                except (RankDied, RankHung, RenderFailed) as error:
                    failure = error
                    self.wait_for(pending)
                    self.fail(failure)
                    if not self.stopped:
                        self.worker.restart_ranks(failure)
            if last and not (failure or self.leaves or self.doubtful or self.lost):
                self.free_since = time.monotonic()
                self.rendered.set()
            self.wait_for(pending)
            if self.stopped:
                return
            broke_off = len(self.doubtful) >= IN_A_ROW
            self.judge()
            if failure is None and not broke_off:
                return  # what is left was cancelled, or gives way

    def rendering(self, clips: Sequence[LeasedClip], publisher: ThreadPoolExecutor) -> Iterator[RenderedClip]:
        """The clips as the ranks finish them. Raises as `Renderer.render` does."""
        settings = self.worker.settings
        return self.worker.renderer.render(
            self.specs(clips),
            on_step=self.on_step,
            cancelled=self.unwanted,
            on_failure=self.fail,
            on_checkpoint=lambda clip: self.on_checkpoint(clip, publisher),
            checkpoint_every=(settings.checkpoint_steps, settings.checkpoint_seconds),
            leave=lambda: self.leaves or len(self.doubtful) >= IN_A_ROW,
        )

    def wait_for(self, pending: Sequence[Future[None]]) -> None:
        """Waits for clips and resume states that are on their way to the store. Raises LeaseLost."""
        for future in (*pending, *self.saving.values()):
            future.result()
        if self.lost is not None:
            raise self.lost

    def on_step(self, clip_id: str, step: int, steps: int) -> None:
        """The engine calls this with the step at which a clip begins, then after every denoising step."""
        if clip_id in self.started:
            return
        self.started[clip_id] = 0
        opened = self.traces[clip_id] = self.open_trace(clip_id)
        self.started[clip_id] = self.write(
            lambda session: start_clip(
                session,
                self.lease,
                clip_id,
                engine=self.worker.owner,
                partition=str(self.worker.partition),
                code_version=code_version(),
                host=socket.gethostname(),
                resumed_step=step or None,
                trace_id=opened.trace_id,
            )
        )
        opened.note(**{"rushes.attempt": self.started[clip_id]})
        if not self.started[clip_id]:  # cancelled, or queued anew, before the lease could tell
            self.cancelled.add(clip_id)

    def open_trace(self, clip_id: str) -> OpenTrace:
        """The trace of an attempt, from when the clip began to wait; linked to the shard's span, in its request's."""
        clip, made, card = next(c for c in self.clips if c.clip_id == clip_id), time.time(), self.worker.card
        settings, since = clip.settings, self.began
        if clip.queued_at is not None and clip.attempt_no == 1:
            since = clip.queued_at.timestamp()
        since = min(since, made)
        still = settings.frames == 1
        opened = begin_trace(
            "clip",
            since,
            linked=self.span,
            **{
                "gen_ai.operation.name": "generate_content",
                "gen_ai.provider.name": "rushes",
                "gen_ai.request.model": card.name,
                "gen_ai.request.seed": clip.seed,
                "gen_ai.output.type": "image" if still else None,  # which has no word for video
                "rushes.output.type": "image" if still else "video",
                "rushes.clip.id": clip_id,
                "rushes.request.id": self.lease.request_id,
                "rushes.shard.id": self.lease.shard_id,
                "rushes.tenant": clip.tenant,
                "rushes.model.digest": card.digest,
                "rushes.partition": str(self.worker.partition),
                "rushes.engine": self.worker.owner,
                **{f"rushes.{name}": getattr(settings, name) for name in ("width", "height", "frames", "fps", "steps")},
            },
        )
        span_between("wait", since, made, parent=opened.carrier)
        return opened

    def on_checkpoint(self, clip: SavedState, publisher: ThreadPoolExecutor) -> None:
        """Uploads in the background; skips it if the clip's previous upload still runs."""
        last = self.saving.get(clip.clip_id)
        if last is None or last.done() or self.leaves:
            self.saving[clip.clip_id] = self.aside(publisher, self.save, clip)

    def aside(self, publisher: ThreadPoolExecutor, work: Callable[..., None], *args: Any) -> Future[None]:
        """Has something done on the publishing thread, whose log then says what this one's would."""
        return publisher.submit(copy_context().run, work, *args)

    def about(self, clip_id: str) -> AbstractContextManager[None]:
        """A context in which what is logged is about this clip."""
        opened = self.traces.get(clip_id)
        return about(clip_id=clip_id, trace_id=opened and opened.trace_id)

    def save(self, clip: SavedState) -> None:
        """Bytes first, row second. What goes wrong here costs some steps if the engine dies, and never the clip."""
        with self.about(clip.clip_id):
            self._save(clip)

    def _save(self, clip: SavedState) -> None:
        key = f"checkpoints/{clip.clip_id}/{self.started[clip.clip_id]}-{clip.step}.safetensors"
        self.objects.add(key)
        try:
            self.worker.store.put_at(key, clip.data)
            with self.worker.ledgers.begin() as session:
                kept = ResumeState(key=key, step=clip.step, fingerprint=clip.fingerprint)
                save_resume_state(session, self.lease, clip.clip_id, kept)
        except Exception as error:
            log.warning("checkpoint %s was not kept: %s", key, error)
        else:
            self.sweep()

    def sweep(self) -> None:
        """Deletes the checkpoints of its clips to which none refers any more; maintenance deletes what stays behind."""
        if not self.objects:
            return
        try:
            with self.worker.ledgers() as session:
                gone = self.objects - resume_keys(session, sorted(self.objects))
            for key in gone:
                self.worker.store.delete(key)
            self.objects -= gone
        except Exception as error:
            log.warning("checkpoints of shard %s were not deleted: %s", self.lease.shard_id, error)

    def unwanted(self) -> set[str]:
        """Clips that need not be rendered any further: cancelled ones, or all of them when the lease is lost."""
        return {clip.clip_id for clip in self.clips} if self.lost else self.cancelled

    def publish(self, rendered: RenderedClip, failed_before: Sequence[str]) -> None:
        """Frames ▶ file ▶ store ▶ ledger. An engine that can do that is not why other clips failed before."""
        with self.about(rendered.clip_id):
            self._publish(rendered, failed_before)

    def _publish(self, rendered: RenderedClip, failed_before: Sequence[str]) -> None:
        clip = next(c for c in self.clips if c.clip_id == rendered.clip_id)
        began = time.time()
        try:
            data, media_type = self.while_leased(lambda: as_file(clip, rendered.frames, self.worker.card.name))
        except LeaseLost:
            raise
        except Exception as error:  # this clip's trouble, not the engine's: the next may well encode
            self.settle_failed(clip.clip_id, f"encoding failed: {error}", error)
            return
        encoded = time.time()
        stored = self.while_leased(lambda: self.worker.store.put(data, media_type))
        ended = time.time()
        kept = self.write(
            lambda session: record_clip(
                session,
                self.lease,
                clip.clip_id,
                artifact=artifacts.NewArtifact(
                    sha256=stored.sha256, key=stored.key, bytes=stored.bytes, media_type=stored.media_type
                ),
                seconds={**rendered.seconds, "encode": encoded - began, "put": ended - encoded},
                trace_id=self.traces[clip.clip_id].trace_id,
                peak_bytes=rendered.peak_bytes,
                skipped_steps=rendered.skipped_steps,
            )
        )
        self.settled.add(clip.clip_id)
        log.info("clip %s is done: %s bytes after %.1f s", clip.clip_id, stored.bytes, ended - self.began)
        self.sweep()
        self.finished += kept
        self.worker.restarts = 0
        self.charge(failed_before)
        self.trace(rendered, (("encode", began, encoded), ("put", encoded, ended), ("record", ended, time.time())))

    def trace(self, rendered: RenderedClip, after: Sequence[tuple[str, float, float]]) -> None:
        """A span for each stage below that of the clip, those of the ranks by what they timed."""
        opened = self.traces[rendered.clip_id]
        steps = [Event(f"step {k}", when) for k, when in enumerate(rendered.steps, 1)]
        for stage, began, ended in (*rendered.spans, *after):
            within = [step for step in steps if stage == "denoise" and began <= step.at <= ended]
            span_between(stage, began, ended, parent=opened.carrier, events=within)
        opened.end(after[-1][2])

    def while_leased(self, ask: Callable[[], T]) -> T:
        """The answer of a server, waited for as long as the lease is ours: a rendered clip is worth it.

        Raises LeaseLost.
        """
        with self.lost_first():
            return with_retry(ask, seconds=math.inf, abandoned=self.is_lost)

    def write(self, work: Callable[[Session], T]) -> T:
        """One transaction of the ledger, waited for as long as the lease is ours. Raises LeaseLost."""
        with self.lost_first():
            return Ledger(self.worker.ledgers).until(self.is_lost).write(work)

    @contextmanager
    def lost_first(self) -> Generator[None]:
        """Raises LeaseLost in place of a server's absence, and before one is asked, once the lease is lost."""
        if self.lost is not None:
            raise self.lost
        try:
            yield
        except Exception as error:
            if self.lost is not None and unavailable_service(error):
                raise self.lost from error
            raise

    def is_lost(self) -> bool:
        return self.lost is not None

    def fail(self, failure: Exception) -> None:
        """Blames the clip that the ranks were at: the named one, or those begun and not finished."""
        named = getattr(failure, "clip_id", None)
        guilty = {named} if named else self.started.keys() - self.settled - self.cancelled - self.doubtful.keys()
        for clip_id in guilty:
            self.on_step(clip_id, 0, 0)  # one that failed before its turn has an attempt too
            self.settle_failed(clip_id, str(failure), failure)

    def settle_failed(self, clip_id: str, said: str, error: Exception) -> None:
        """Charges the clip, at once where the engine cannot be the reason. Input that is bad stays bad, and is not
        tried again.
        """
        self.doubtful[clip_id] = said, error
        if class_of(error) not in DOUBTFUL:
            self.charge([clip_id])

    def charge(self, clip_ids: Sequence[str]) -> None:
        """Records failures that were in doubt as those of their clips."""
        for clip_id in clip_ids:
            if (doubt := self.doubtful.get(clip_id)) is None:
                continue
            said, error = doubt
            with self.about(clip_id):
                why = said.removeprefix(f"clip {clip_id}: ")
                log.warning("attempt %s at clip %s failed: %s", self.started.get(clip_id, ""), clip_id, why)
            kind, permanent, of_machine = class_of(error), isinstance(error, BadMedia), isinstance(error, DeviceFailed)
            self.write(
                lambda session, clip_id=clip_id, said=said, kind=kind, permanent=permanent, of_machine=of_machine: (
                    fail_clip(
                        session,
                        self.lease,
                        clip_id,
                        said,
                        error_class=kind,
                        permanent=permanent,
                        of_machine=of_machine,
                    )
                )
            )
            self.settled.add(clip_id)
            self.doubtful.pop(clip_id, None)
            if clip_id in self.traces:
                self.traces[clip_id].end(time.time(), said)

    def judge(self) -> None:
        """Charges the clips that failed since one was last made, if a plain one can be: else the engine is at fault.

        Raises EngineUnfit then. These clips were not charged, and go back with the shard.
        """
        if not self.doubtful or (trouble := self.worker.trial()) is None:
            self.charge(list(self.doubtful))
        elif self.lost is not None:
            raise self.lost
        elif not self.stopped:  # which kills ranks
            said, _ = next(reversed(self.doubtful.values()))
            raise EngineUnfit(
                f"engine {self.worker.owner} stops: clips in a row failed ({len(self.doubtful)}, the last: {said}), "
                f"and so did a plain one ({trouble}). Its machine or model is at fault: they are charged with nothing"
            )


# The first that fits: OutOfMemory and DeviceFailed are RankDied.
ERROR_CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (OutOfMemory, "out_of_memory"),
    (DeviceFailed, "device_error"),
    (RankDied, "rank_died"),
    (RankHung, "rank_hung"),
    (RenderFailed, "render_failed"),
    (BadMedia, "bad_input"),
    (NoSuchKey, "missing_bytes"),
    (WrongDigest, "wrong_bytes"),
)


DOUBTFUL = ("device_error", "render_failed", "encode_failed")  # may be the clip's fault, or the engine's


def class_of(error: Exception) -> str:
    """The kind of a failure, in the word that `attempts.error_class` holds; `encode_failed` for any other."""
    return next((name for kind, name in ERROR_CLASSES if isinstance(error, kind)), "encode_failed")
