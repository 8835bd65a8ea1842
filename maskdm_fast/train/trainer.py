"""The training loop. It knows no stage: a stage turns batches into updates, the loop logs, saves and stops."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm_fast.data import ImageStore
from maskdm_fast.eval import save_grid
from maskdm_fast.ops import backend
from maskdm_fast.train import checkpoint as checkpoints
from maskdm_fast.train.config import RunConfig
from maskdm_fast.train.feed import Feed
from maskdm_fast.train.hardware import stated_peak
from maskdm_fast.train.journal import Journal, RunJournal, SilentJournal
from maskdm_fast.train.metrics import (
    Meter,
    Stopwatch,
    TrainingDivergedError,
    git_commit,
    machine,
    package_versions,
    read_metrics,
)
from maskdm_fast.train.signals import StopSignals
from maskdm_fast.train.stages import Stage
from maskdm_fast.train.watchdog import Watchdog
from maskdm_fast.train.world import LostPeerError, Vote, World, lost_peer

_FINISHED = ("num_images", "max_seconds")
_REASONS = ("", "max_seconds", "SIGINT", "SIGTERM")  # what processes vote on; the last counts most


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step: optimizer steps done, over all resumes.
        images: ``step * batch_size``, of all processes.
        seconds: training time over all resumes, without set-up, checkpoints and previews.
        reason: ``num_images``, ``max_seconds``, or the name of the signal that ended it.
    """

    folder: Path
    step: int
    images: int
    seconds: float
    reason: str

    @property
    def finished(self) -> bool:
        """Whether a stopping rule of the configuration was met, not a signal."""
        return self.reason in _FINISHED


class Trainer:
    """One run, from its newest checkpoint to a stopping rule. All processes make one and call the same methods.

    What a run needs to continue is the step number (images = step * batch_size) and the stage's state; every random
    draw and the order of the data follow from those and the seed. The unfinished means and the seconds are kept for
    the log.

    Args:
        config: validated.
        folder: the run folder, locked by the main process.
        stage: freshly built.
        store: the images.
        feed: of this process, over `store`.
        world: the processes that train.
        score: the scores of a stage by their names; None where ``score_images`` is 0.
        engine: name of the stage's, for the records.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        stage: Stage,
        store: ImageStore,
        feed: Feed,
        world: World,
        score: Callable[[Stage], dict[str, float | int]] | None = None,
        *,
        engine: str,
    ) -> None:
        self.config, self.folder, self.stage, self.store, self.world = config, folder, stage, store, world
        self.step = 0
        self._feed, self._score, self._engine = feed, score, engine
        peak = stated_peak(world.device, config.precision)
        self._peak = None if peak is None else peak * world.world_size
        self._meter = Meter(world)
        self._vote = Vote(world)
        self._seconds = 0.0
        self._saved: int | None = None
        self._scored: int | None = None
        self._data = {"name": config.data, "num_images": len(store), "checksum": store.header.checksum}

    @property
    def images(self) -> int:
        """Images done."""
        return self.step * self.config.stage.batch_size

    def load(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint of this run; ValueError if the data set is not the one it was made with."""
        if any(checkpoint.state["data"][key] != self._data[key] for key in ("num_images", "checksum")):
            raise ValueError(
                f"the data set has changed since {checkpoint.path} was written: {checkpoint.state['data']} then, "
                f"{self._data} now. Restore it, or start a new run folder with --init-from {self.folder}"
            )
        self.stage.load(checkpoint.reader)
        self.step = self._saved = checkpoint.step
        self._meter.load_state_dict(checkpoint.state["meter"])
        self._seconds = checkpoint.state["seconds"]

    def run(self, signals: StopSignals, *, title: str) -> TrainResult:
        """Train until a stopping rule is met or a signal came.

        Raises:
            TrainingDivergedError: a loss or gradient was not finite; no checkpoint was written after that step.
            CheckpointError: a checkpoint could not be written.
            PeerError, LostPeerError: another process failed or ended.
        """
        self._scored = self.world.on_main(self._last_score)
        with ExitStack() as stack:
            self._journal = self._open_journal(title)
            stack.callback(self._journal.close)
            limit, world = self.config.machine.stall_seconds, self.world
            self._watchdog = Watchdog(limit, rank=world.rank, world_size=world.world_size)
            stack.callback(self._watchdog.close)
            self._stopwatch = Stopwatch(self._seconds)
            try:
                return self._train(signals)
            except TrainingDivergedError as error:
                raise TrainingDivergedError(error.name, error.step, self._advice()) from None
            except RuntimeError as error:
                lost = lost_peer(error) if world.world_size > 1 else None
                if lost is None:
                    raise
                raise LostPeerError(f"{lost} in step {self.step + 1}. {self._way_back()}") from error

    def _last_score(self) -> int | None:
        """The step of the newest score that belongs to this run as it stands; those of a lost future do not count."""
        records = [record for record in read_metrics(self.folder) if record["kind"] == "score"]
        return max((record["step"] for record in records if record["step"] <= self.step), default=None)

    def _open_journal(self, title: str) -> Journal:
        if not self.world.is_main:
            return SilentJournal()
        header = {
            "config": self.config.to_dict(),
            "commit": git_commit(),
            "versions": package_versions(),
            "machine": {**machine(), "device": str(self.world.device)},
            "processes": self.world.world_size,
            "engine": self._engine,
            "data": self._data,
        }
        return RunJournal(self.config, self.folder, title, self.step, self.images, header)

    def _train(self, signals: StopSignals) -> TrainResult:
        timer, step_images = self.world.timer, self.config.stage.batch_size
        self._logged, flops, tokens = (self.step, self._seconds), 0.0, 0.0
        while True:
            self._watchdog.beat(self.step + 1)
            reason = self._stop_reason(signals)
            if reason or self._due(self.step, self.config.output.checkpoint_images):
                self._save()
                # A signal that came meanwhile ends the run here: a score that is due would be lost one step later.
                reason = reason or self._heard(signals, now=True)
            if self._score_due(reason):
                self._write_score()
            if reason:
                return TrainResult(self.folder, self.step, self.images, self._stopwatch.seconds, reason)
            logs = self._due(self.step + 1, self.config.output.log_images)
            if logs:
                timer.arm()
            with timer.part("data"):
                batches = self._feed.batches(self.step)
            values = self.stage.step(batches, self.step)
            flops += step_images * self.stage.flops_per_image(self.step)
            tokens += step_images * self.stage.tokens_per_image(self.step)
            self.step += 1
            self._meter.update(values, self.step)
            self._journal.advance(self.images, self._stopwatch.seconds)
            if logs:
                self._log(flops, tokens)
                flops = tokens = 0.0

    def _stop_reason(self, signals: StopSignals) -> str | None:
        """Why all processes stop before the next step; None if they do not."""
        heard = self._heard(signals)
        if heard:
            return heard
        stage = self.config.stage
        if stage.num_images is not None and self.images >= stage.num_images:
            self._vote.settle()
            return "num_images"
        return None

    def _heard(self, signals: StopSignals, *, now: bool = False) -> str | None:
        """A reason that one of the processes had a step ago, alone or with `now` one that it has now."""
        limit, reason = self.config.stage.max_seconds, signals.received or ""
        if not reason and limit is not None and self._stopwatch.seconds >= limit:
            reason = "max_seconds"
        heard = self._vote.say(_REASONS.index(reason))
        if now or heard:
            heard = max(heard, self._vote.settle())
        return _REASONS[heard] or None

    def _due(self, step: int, interval_images: int) -> bool:
        """Whether step number `step` is the last of an interval (rounded to whole steps)."""
        return step > 0 and step % max(1, round(interval_images / self.config.stage.batch_size)) == 0

    def _score_due(self, reason: str | None) -> bool:
        """At intervals and when the run is finished; a signal does not wait for it, the resumed run makes up for it."""
        if self._score is None or self.step == 0 or self._scored == self.step:
            return False
        return self._due(self.step, self.config.output.score_images) if reason is None else reason in _FINISHED

    def _log(self, flops: float, tokens: float) -> None:
        self._meter.check()
        means, split, seconds = self._meter.means(), self.world.timer.take(), self._stopwatch.seconds
        step, before = self._logged
        elapsed = max(seconds - before, 1e-9)
        record: dict[str, Any] = {
            "step": self.step,
            "images": self.images,
            "seconds": round(seconds, 3),
            **means,
            "lr": self.stage.lr(self.step - 1),
            "images_per_s": (self.step - step) * self.config.stage.batch_size / elapsed,
            "tokens_per_s": tokens / elapsed,
            "model_tflops": flops / elapsed * 1e-12,
            "peak_mib": self.world.largest(backend.peak_memory(self.world.device)) / 2**20,
            **split,
        }
        if self._peak is not None:
            record["mfu"] = flops / elapsed / self._peak
        self._journal.log(record)
        self._logged = self.step, seconds

    def _save(self) -> None:
        if self._saved == self.step:
            return
        self._meter.check()
        with self._stopwatch.paused(), self._watchdog.paused("checkpoint"):
            self._journal.sync()
            state = {
                "step": self.step,
                "images": self.images,
                "seconds": self._stopwatch.seconds,
                "config": self.config.to_dict(),
                "meter": self._meter.state_dict(),
                "data": self._data,
                "class_names": self.store.class_names,
            }
            keep = self.config.output.keep_checkpoints
            checkpoints.save(self.folder, self.stage.pieces(), state, keep=keep, world=self.world)
            self._saved = self.step
            if self.config.output.preview_images:
                images = self.stage.preview(self.config.output.preview_images)
                path = self.folder / "samples" / f"step-{self.step:08d}.png"
                self._journal.image(path, self.images, lambda path: save_grid(images, path))

    def _write_score(self) -> None:
        self._meter.check()
        with self._stopwatch.paused(), self._watchdog.paused("score"):
            scores = self._score(self.stage)
            seconds = round(self._stopwatch.seconds, 3)
            self._journal.score({"step": self.step, "images": self.images, "seconds": seconds, **scores})
            self._scored = self.step

    def _advice(self) -> str:
        again = "Training is deterministic, so the same command would meet it again. Start a new run folder"
        mend = "with a lower --lr, a longer --warmup-images, a smaller --max-grad-norm or --precision fp32"
        if not self._saved:
            return f"There is no checkpoint yet. {again} {mend}."
        return f"The last good checkpoint is that of step {self._saved}. {again} by --init-from {self.folder}, {mend}."

    def _way_back(self) -> str:
        newest = f"goes on from step {self._saved}" if self._saved else "begins anew, for there is no checkpoint yet"
        return f"The same command {newest}"
