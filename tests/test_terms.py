"""Every term against the rules, its plain twin and a gradient; what they read, and what they refuse."""

from __future__ import annotations

import pytest

from align_ti import Objective
from align_ti.registry import lookup, names
from align_ti.testing import check_term

OPTIONS = [
    ("sft", {}),
    ("kd", {"temperature": 2.0}),
    ("kd", {"divergence": {"name": "jensen_shannon", "beta": 0.3}}),
    ("iva", {"layer": 1}),
    ("iva", {"layer": 0, "images": "separately", "share": 0.6, "divergence": "reverse_kl"}),
    ("tpa", {}),
    ("tpa", {"form": "packed", "divergence": {"name": "skew_kl", "alpha": 0.2}}),
    ("llava_kd_mdist", {}),
    ("llava_kd_mdist", {"visual_weight": 0.3, "divergence": "total_variation"}),
    ("llava_kd_rdist", {}),
    ("llava_kd_rdist", {"of": "hidden"}),
    ("align_kd", {}),
    ("compodistill", {}),
    ("compodistill", {"form": "code"}),
    ("compodistill", {"student_layers": [0, 1], "teacher_layers": [0, 1]}),
    ("em_kd_vsd", {}),
    ("em_kd_vlad", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_a_term_keeps_the_rules_and_equals_its_plain_twin(name, options):
    check_term(Objective.only(**{name: options}).terms[name])


def test_every_term_is_held_to_the_rules():
    assert {name for name, _ in OPTIONS} == set(names("term"))
    assert all(lookup("term", name).name == name for name in names("term"))
