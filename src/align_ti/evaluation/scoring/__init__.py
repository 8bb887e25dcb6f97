"""What an answer is worth, by each benchmark's own rule, as pure functions. Imports no torch.

Each rule of a published benchmark is its original's to the letter, oddities included; what Align-TI does differently stands above
it, in `align_ti.evaluation.benchmarks`.
"""

from align_ti.evaluation.scoring.exact import Accuracy, accuracy, by_kind, is_right, normalise
from align_ti.evaluation.scoring.gqa import gqa_normalize
from align_ti.evaluation.scoring.mmbench import mmbench_choice
from align_ti.evaluation.scoring.mme import mme_answer
from align_ti.evaluation.scoring.own import (
    SCORERS,
    anls,
    choice_letter,
    contains,
    exact_match,
    numeric,
    vqa_consensus,
    word_f1,
    yes_no,
)
from align_ti.evaluation.scoring.pope import pope_answer
from align_ti.evaluation.scoring.scienceqa import scienceqa_choice
from align_ti.evaluation.scoring.vqa import vqa_accuracy, vqa_normalize

__all__ = [
    "SCORERS",
    "Accuracy",
    "accuracy",
    "anls",
    "by_kind",
    "choice_letter",
    "contains",
    "exact_match",
    "gqa_normalize",
    "is_right",
    "mmbench_choice",
    "mme_answer",
    "normalise",
    "numeric",
    "pope_answer",
    "scienceqa_choice",
    "vqa_accuracy",
    "vqa_consensus",
    "vqa_normalize",
    "word_f1",
    "yes_no",
]
