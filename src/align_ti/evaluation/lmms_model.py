"""The model class that lmms-eval makes; lmms-eval alone imports this module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from accelerate import PartialState
from lmms_eval.api.model import lmms
from tqdm import tqdm

from align_ti.config import Generation
from align_ti.errors import DataError
from align_ti.evaluation.lmms import Request, answers
from align_ti.models.loading import best_device, load_model, load_processor


class AlignTI(lmms):  # type: ignore[misc]
    """A student, teacher or any model that `align-ti evaluate` takes: `--model align_ti --model_args pretrained=FOLDER`.

    Args:
        pretrained: the folder or hub name.
        dtype: precision of the weights, as in `align-ti evaluate`; "auto": as they were saved.
        device: where it computes; by default the accelerator if there is one.
        batch_size: questions answered at a time.
        max_batch_size: lmms-eval's own; a batch has at most so many questions.
        max_new_tokens: tokens of one answer at most where the task does not say.
        seed: fixes the draws of tasks that ask for a temperature.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = int(batch_size) if max_batch_size is None else min(int(batch_size), int(max_batch_size))
        self.defaults = Generation(batch_size=size, max_new_tokens=int(max_new_tokens), seed=int(seed))
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        # Each process of a launch has an accelerator of its own, whatever --device says.
        place = str(state.device) if state.num_processes > 1 else device or str(best_device())
        self.model, self.processor = load_model(pretrained, dtype, place), load_processor(pretrained)

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """The answer to each request, in order."""
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answer") as bar:
            texts = answers(self.model, self.processor, requests, self.task_dict, self.defaults, bar.update)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused.

        Raises:
            DataError: always.
        """
        raise refused("log-likelihoods of given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused.

        Raises:
            DataError: always.
        """
        raise refused("answers in several rounds")


def refused(what: str) -> DataError:
    """The error for tasks of another kind."""
    return DataError(
        f"--tasks holds a task that asks for {what}; tasks of one answer (output_type: generate_until) are accepted; leave it out."
    )
