"""Continued pretraining: what a run takes from the checkpoint that it starts from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import HRMConfig, PretrainConfig
from ..console import print0
from ..continue_config import ContinueConfig
from ..data import ByteStream, load_stream
from ..data.corpus_files import text_files
from ..distributed import rank
from ..errors import HRMError
from ..evaluation import TextScore
from ..model import HRMModel
from ..ngrams.entries import Entries
from ..ngrams.table import EarlierCounts
from .checkpoint import Checkpoint, checkpoint_path, load_checkpoint
from .resume import saved_command
from .trainer import TrainResult
from .weights import ENTRIES, TABLE, without_counts

CHECKSUM = "earlier_counts"  # among the facts of a run: of the counts it added its own to
ScoreText = Callable[[HRMModel, ByteStream], TextScore]


@dataclass(frozen=True)
class Change:
    """Bits per byte of a text ``before`` a run, if known, and ``after`` it."""

    before: float | None
    after: float

    def __str__(self) -> str:
        before = "" if self.before is None else f"{self.before:.3f} before, "
        return f"{before}{self.after:.3f} after"


@dataclass(frozen=True)
class ContinueResult(TrainResult):
    """Result of continued pretraining: also the scores of the ``new`` text and of the ``old`` one,
    each if there is held-out text of it, in the first process."""

    new: Change | None = None
    old: Change | None = None


@dataclass
class Start:
    """Where continued pretraining starts.

    ``config`` of the model. ``earlier``: facts about each text that it was trained on, the oldest
    first. ``checkpoint``: what the run starts from; ``None`` if the run is resumed, which does not
    need it. ``facts`` about the run, for `Checkpoint.origin`: the scores before it, and the
    checksum of the earlier counts.
    """

    options: ContinueConfig
    config: HRMConfig
    earlier: list[dict[str, Any]]
    checkpoint: Checkpoint | None
    facts: dict[str, Any] = field(default_factory=dict)
    old_text: ByteStream | None = None

    def build_model(self) -> HRMModel:
        """Builds the model, with the weights of the checkpoint if it is there.

        Raises:
            HRMError: the weights do not fit the config.
        """
        model = HRMModel(self.config)
        if self.checkpoint is not None:
            missing, unexpected = model.load_state_dict(self.checkpoint.weights, strict=False)
            # Cross-attention that the checkpoint does not have starts with a zero output.
            if unexpected or any("cross" not in name for name in missing):
                raise HRMError("the checkpoint's weights do not fit its config")
        return model

    def score_before(self, model: HRMModel, new_text: ByteStream, score: ScoreText) -> None:
        """Scores the model before its training, in the first process of a run that begins."""
        if self.checkpoint is None or rank() != 0:
            return
        print0(f"checkpoint: {checkpoint_path(self.options.ckpt, ('pretrain',))}")
        for name, text in (("new", new_text), ("old", self.old_text)):
            if text is not None and len(text):
                bpb = score(model, text).bits_per_byte
                self.facts[f"{name}_bpb_before"] = bpb
                print0(f"before: {bpb:.3f} bits per byte of held-out {name} text")

    def add_scores(self, result: TrainResult, model: HRMModel, score: ScoreText) -> ContinueResult:
        """Returns the result of a run with the scores before and after it."""
        new = old = None
        if result.score is not None:
            assert isinstance(result.score, TextScore)
            new = Change(self.facts.get("new_bpb_before"), result.score.bits_per_byte)
        if self.old_text is not None and rank() == 0:
            after = score(model, self.old_text).bits_per_byte
            old = Change(self.facts.get("old_bpb_before"), after)
        known = {f.name: getattr(result, f.name) for f in fields(result)}
        return ContinueResult(**known, new=new, old=old)

    def earlier_counts(self) -> EarlierCounts | None:
        """Returns the n-gram counts to add those of the new text to, if any."""
        if self.options.counts == "new":
            return None
        if self.checkpoint is not None:
            entries, min_count = checkpoint_counts(self.checkpoint)
            self.checkpoint.weights = without_counts(self.checkpoint.weights)
            self.facts[CHECKSUM] = f"{zlib.crc32(entries.data, min_count):08x}"
            return EarlierCounts(self.facts[CHECKSUM], lambda: (entries, min_count))
        return EarlierCounts(self.facts.get(CHECKSUM, ""), self.reload_counts)

    def reload_counts(self) -> tuple[Entries, int]:
        """Reads the earlier counts again, for a resumed run whose cache file of counts is gone.

        Raises:
            HRMError: the checkpoint is gone, or another one.
        """
        file = Path(self.options.out_dir) / "ngrams.counts"
        try:
            entries, min_count = checkpoint_counts(load_start(self.options))
        except HRMError as error:
            raise HRMError(f"{file} is missing and made again from --ckpt: {error}") from error
        if f"{zlib.crc32(entries.data, min_count):08x}" != self.facts.get(CHECKSUM):
            raise HRMError(
                f"{file} is missing, and --ckpt {self.options.ckpt} is not what the run started "
                "from: give that checkpoint, or start again with --overwrite"
            )
        return entries, min_count


def checkpoint_counts(checkpoint: Checkpoint) -> tuple[Entries, int]:
    """Returns the entries of a checkpoint's n-gram table, and the count below which contexts were
    dropped."""
    entries: Entries = checkpoint.weights[ENTRIES].numpy()
    return entries, int(checkpoint.weights[f"{TABLE}.min_count"])


def load_start(options: ContinueConfig) -> Checkpoint:
    """Loads the checkpoint of --ckpt.

    Raises:
        HRMError: see `load_checkpoint`; or it is not one of pretraining.
    """
    path = checkpoint_path(options.ckpt, ("pretrain",))
    checkpoint = load_checkpoint(path)
    if checkpoint.stage != "pretrain":
        raise HRMError(
            f"{path} is finetuned, and would forget how to answer: give the pretrained checkpoint "
            "that it was made from, and finetune again afterwards"
        )
    if checkpoint.training is not None:
        raise HRMError(f"{path} is a state for --resume: give the checkpoint that ends in _last.pt")
    return checkpoint


def read_start(options: PretrainConfig, resumed: Checkpoint | None) -> Start | None:
    """Returns where a run starts; ``None`` for a new model.

    Raises:
        HRMError: see `load_start`; or the run to resume started otherwise.
    """
    was_continued = resumed is not None and "earlier" in resumed.origin
    if not isinstance(options, ContinueConfig):
        if resumed is not None and was_continued:
            raise HRMError(
                f"the run in {options.out_dir} started from a checkpoint: give --ckpt"
                f"{saved_command(resumed)}"
            )
        return None
    if resumed is not None:
        if not was_continued:
            raise HRMError(
                f"the run in {options.out_dir} started without --ckpt: leave it out"
                f"{saved_command(resumed)}"
            )
        known = resumed.origin.get("pretrain", {})
        names = ("new_bpb_before", "old_bpb_before", CHECKSUM)
        facts = {name: known[name] for name in names if name in known}
        start = Start(options, resumed.config, resumed.origin["earlier"], None, facts)
    else:
        checkpoint = load_start(options)
        origin = checkpoint.origin
        earlier = [*origin.get("earlier", []), origin.get("pretrain", {})]
        config = replace(
            checkpoint.config,
            cross_attention=checkpoint.config.cross_attention or options.denoise > 0,
            sep=options.sep,
            line_breaks=checkpoint.config.line_breaks or options.sep in ("stanza", "file"),
        )
        start = Start(options, config, earlier, checkpoint)
    if options.val_old is not None:
        reading = earlier_reading(start.earlier[-1])
        start.old_text = load_stream(text_files([options.val_old]), *reading)
    return start


def earlier_reading(facts: dict[str, Any]) -> tuple[str, None, str]:
    """Returns the arguments of `load_stream` with which a text was read."""
    return facts.get("encoding", "utf-8"), None, facts.get("sep", "line")
