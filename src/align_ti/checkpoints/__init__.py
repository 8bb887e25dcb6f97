"""Ordinary LLaVA folders made from parts, or from the checkpoints that the paper's authors published."""
