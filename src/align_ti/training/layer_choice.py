"""The teacher's layer that attention is read at, scored once for all processes of a run and kept in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from align_ti.config import Scores
from align_ti.data.collator import EncodedConversations
from align_ti.errors import AlignTIError, ConfigError, ModelError
from align_ti.interactions.layer_scores import best_layer, score_on_records
from align_ti.models.loading import weights_digest
from align_ti.models.sharding import is_sharded, run_gathered
from align_ti.runs import RunFolder, read_json, write_json

TEXTS = 1000
"""The conversations at the beginning of a dataset by which kept layer scores are recognised."""


def chosen_layer(
    teacher: PreTrainedModel,
    processor: Any,
    data: Any,
    scores: Scores,
    args: TrainingArguments,
    *,
    term: str,
    digest: str | None = None,
) -> int:
    """The layer with the highest instruction-relevance score (IRS) on a sample of the training data; the output folder's
    `layer_scores.json` is used if it was made from the same.

    Args:
        teacher: the teacher.
        processor: its processor.
        data: the training data.
        scores: the size of the sample.
        args: name the output folder, the seed and the processes.
        term: the term that needs a layer, for messages.
        digest: of the teacher's weights, if they are in parts by now.

    Raises:
        ConfigError: the training data are no conversations, so that there is nothing to score on.
        DataError: no image has two instructions.
        ModelError: the teacher's weights differ between processes.
    """
    path = RunFolder(Path(str(args.output_dir))).layer_scores
    made_from = {
        "teacher": teacher.config.name_or_path,
        "weights": digest or digest_of(teacher, args),
        "records": len(data) if isinstance(data, Sized) else None,
        "texts": texts_digest(data),
        "sample": scores.model_dump(),
        "seed": args.seed,
    }
    kept = read_json(path) if path.exists() else {}
    if kept.get("of") == made_from:
        return int(kept["layer"])

    def score() -> dict[int, float]:
        if not isinstance(data, EncodedConversations) or not isinstance(processor, ProcessorMixin):
            raise ConfigError(
                f"objective.{term}.layer is 'auto', but the training data are no conversations, so layers cannot be scored; give a "
                "number (score_layers finds it) or pass conversations as train_dataset."
            )
        return score_on_records(
            teacher, processor, data.conversations, **scores.model_dump(), seed=int(args.seed), device=args.device
        )

    found = scored_once(teacher, score, args)
    layer = best_layer(found)
    if args.process_index == 0:
        values = {str(key): value for key, value in found.items()}
        write_json(path, {"layer": layer, "scores": values, "of": made_from})
    return layer


def digest_of(teacher: PreTrainedModel, args: TrainingArguments) -> str:
    """A digest of the teacher's weights.

    Raises:
        ModelError: it is another one on another process.
    """
    digest = weights_digest(teacher)
    if args.world_size > 1:
        found = gather_object([digest])
        if len(set(found)) > 1:
            raise ModelError(
                f"the teacher's weights differ between processes (digests: {', '.join(one[:8] for one in found)}); the same "
                "weights on all of them are accepted; load it on every process (FSDP_CPU_RAM_EFFICIENT_LOADING=false does so in "
                "from_pretrained)."
            )
    return digest


def scored_once(
    teacher: PreTrainedModel, score: Callable[[], dict[int, float]], args: TrainingArguments
) -> dict[int, float]:
    """The scores, the same on all processes: the first computes them, unless the teacher is sharded.

    Raises:
        AlignTIError: as `score`, on all processes.
    """
    if args.world_size == 1:
        return score()
    result: list[Any] = [None]
    if args.process_index == 0 or is_sharded(teacher):
        try:
            result = [run_gathered(teacher, score)]
        except AlignTIError as error:
            result = [error]
    found = broadcast_object_list(result, from_process=0)[0]
    if isinstance(found, AlignTIError):
        raise found
    scores: dict[int, float] = found
    return scores


def texts_digest(data: Any) -> str | None:
    """A digest of the texts and the names of images in the first conversations of a dataset; None if it has none."""
    if not isinstance(data, EncodedConversations):
        return None
    first = [data.conversations[index] for index in range(min(len(data), TEXTS))]
    told = [
        [[turn.text for turn in one.turns], [image.name for image in one.images if isinstance(image, Path)]]
        for one in first
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
