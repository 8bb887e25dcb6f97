"""A Hugging Face Trainer that minimises the Align-TI objective; everything users know of it works."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

from align_ti.allocator import keep_freed_memory
from align_ti.config import Objective, OnPolicy, Scores, listed, nothing_compared
from align_ti.data.batch import Tokens
from align_ti.data.collator import Collator, EncodedConversations, blank_sample
from align_ti.data.conversation import Conversation
from align_ti.data.lengths import LengthGrouped
from align_ti.data.stream_shards import OWN_RECORDS
from align_ti.errors import ConfigError
from align_ti.interactions.candidates import CandidateOptions, plan_candidates
from align_ti.interactions.transitions import Candidates
from align_ti.models.adapters import load_trained, save_trained, unwrapped
from align_ti.models.families import widest_float
from align_ti.models.headonly import has_head_only
from align_ti.models.loading import check_loaded, check_precision, check_teacher_precision
from align_ti.models.pairing import Pairing, own_processor, pair_up
from align_ti.models.placement import move
from align_ti.models.preservation import preserved
from align_ti.models.sharding import is_sharded, run_gathered, run_in_forward, shard
from align_ti.phases import OTHER, outside_of_steps, phase
from align_ti.training.engines import check as check_engine
from align_ti.training.engines import name_layers, shards_weights
from align_ti.training.gradients import FLOAT16_SCALE, LogsGradients, added_gradients, norm_of, only, shares_of
from align_ti.training.held_out import records_of_its_own, stream_loader, weightless_from
from align_ti.training.layer_choice import chosen_layer, digest_of
from align_ti.training.objective import DistillationOutput, Masses, distillation_loss, term_masses
from align_ti.training.passes import candidate_options, candidates_for
from align_ti.training.rollout import respond
from align_ti.training.sums import Sums
from align_ti.training.watch import StepPhases
from align_ti.training.work import TrainingWork

logger = logging.getLogger(__name__)


Data = Sequence[Conversation] | Dataset[dict[str, Any]]
"""Records, or a dataset of encoded samples."""


class AlignTITrainer(Trainer):
    """Trains a student with the terms of an objective: SFT, KD, IVA and TPA, or any others.

    Each term is logged unweighted under its own name with its weight (`kd`, `kd_weight`), and `branch_share` is the share of TPA
    candidates that needed a row of their own. Terms are normalised over the whole optimizer step, whatever the accumulation and
    the number of processes. Random draws depend on seed, step and process alone, so a resumed run repeats them.

    Args:
        model: the student, with or without adapters of peft.
        teacher_model: the teacher; it is put into eval mode, frozen, and moved to the student's device, unless it is quantised or
            has a device of its own (`align_ti.models.placement.stay`). None for sft alone.
        args: transformers' arguments. `remove_unused_columns` is switched off, since a batch carries roles.
        objective: terms and weights; `iva.layer="auto"` is resolved by scoring layers on a sample of the training data, once, and
            kept in `layer_scores.json` in the output folder.
        train_dataset: conversations, or a dataset whose items are encoded samples (`align_ti.data.roles.encode`).
        eval_dataset: the same for evaluation, or a mapping of names to several.
        processing_class: the student's processor.
        teacher_processing_class: the teacher's processor, if it has its own. If it produces different inputs from a record than the
            student's, each model reads its own.
        data_collator: by default one that pads with the processor's pad token.
        scores: the size of the sample on which layers are scored.
        phases: if given, it measures where the time of each step goes.
        work: if given, it counts the tokens that are trained on, and the FLOPs of the first steps.
        gradient_shares_every: steps between two measurements of each term's share in the gradient, which the log has as
            `kd_gradient_share` and `kd_gradient_norm`; 0: none.
        on_policy: if given, the student answers some training batches. In the log, `on_policy_share` is the share of these batches,
            and `cut_share` the share of their answers that were truncated at the limit.
        shard_teacher: spread the teacher's weights over all processes, with any training engine; no effect with one process.
        trainer_options: anything else that transformers' Trainer takes, such as callbacks.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        teacher_model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        objective: Objective | None = None,
        train_dataset: Data | None = None,
        eval_dataset: Data | Mapping[str, Data] | None = None,
        processing_class: ProcessorMixin | None = None,
        data_collator: Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]] | None = None,
        scores: Scores | None = None,
        teacher_processing_class: ProcessorMixin | None = None,
        phases: StepPhases | None = None,
        on_policy: OnPolicy | None = None,
        shard_teacher: bool = False,
        work: TrainingWork | None = None,
        gradient_shares_every: int = 0,
        **trainer_options: Any,
    ) -> None:
        self.objective: Objective = Objective() if objective is None else objective
        self.on_policy = on_policy
        if on_policy is not None and (found := nothing_compared(self.objective)) is not None:
            raise ConfigError(
                f"on_policy is given, but {found}, and nothing else is learned from the student's own answers; give such a term a "
                "weight, or leave on_policy out."
            )
        if on_policy is not None and getattr(train_dataset, "teacher_cache", None) is not None:
            raise ConfigError(
                "on_policy is given, but train_dataset has a teacher cache, which knows nothing of the student's own answers; leave "
                "one of the two out."
            )
        if self.objective.needs_teacher and teacher_model is None:
            raise ConfigError(
                f"the objective has {', '.join(self.objective.active)}, but no teacher_model was given; give one, or leave out "
                "the terms that "
                f"need it: {listed(self.objective)} (weight: 0)."
            )
        if data_collator is None:
            if processing_class is None:
                raise ConfigError(
                    "processing_class is missing; give the student's processor, or a data_collator of your own."
                )
            theirs = None if teacher_processing_class is None else teacher_processing_class.tokenizer.pad_token_id
            data_collator = Collator(processing_class.tokenizer.pad_token_id, teacher_pad_token=theirs)
        self.teacher_processor = own_processor(processing_class, teacher_processing_class)
        args = TrainingArguments(output_dir="align-ti-run") if args is None else args
        args.remove_unused_columns = False
        if args.torch_compile:
            raise ConfigError(
                "torch_compile is true in the TrainingArguments, where it wraps the student's forward, which this loss does not call; "
                "leave it out and call align_ti.models.compilation.compile_tokenwise(model) (in a recipe: training.torch_compile)."
            )
        check_precision(model, fp16=args.fp16)
        if isinstance(model, PeftModel) and args.label_names is None:
            args.label_names = ["labels"]
        loader: Any = args.accelerator_config
        if loader.dispatch_batches is None:
            # A batch split over processes by its first axis would lose images of records that have several.
            loader.dispatch_batches = False
        if args.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible to one process; it uses the first. `accelerate launch` uses all of them.",
                args.n_gpu,
            )
            args._n_gpu = 1
        config = unwrapped(model).config
        kept = {name: value for name, value in vars(config).items() if name == "use_cache"}
        self.phases, self.work = phases, work
        self.gradient_shares_every, self.shares = gradient_shares_every, LogsGradients(self.log)
        # First, so that a step's time holds nothing of the other callbacks, and a checkpoint's list all of its files.
        first = [one for one in (phases, work) if one is not None]
        trainer_options["callbacks"] = [*first, *(trainer_options.get("callbacks") or []), self.shares]
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=encoded(train_dataset, processing_class, self.teacher_processor),
            eval_dataset=encoded(eval_dataset, processing_class, self.teacher_processor),
            processing_class=processing_class,
            **trainer_options,
        )
        # transformers switches the cache off in the config, and the student would be saved so; every pass here says it by itself.
        vars(config).pop("use_cache", None)
        vars(config).update(kept)
        self.check_sharding()
        if self.is_fsdp_enabled:
            name_layers(self.accelerator.state.fsdp_plugin, unwrapped(model))
        self.scores = Scores() if scores is None else scores
        self.seconds_before_step = 0.0
        """How long the last step's batches, answers of the student and candidates took before transformers says that it begins."""
        self.teacher_model = teacher_model
        if teacher_model is not None:
            teacher_model.requires_grad_(False).eval()
            check_teacher_precision(teacher_model, self.args.device, bf16=self.args.bf16)
            move(teacher_model, self.args.device)
        self.pairing = Pairing()
        if teacher_model is not None and self.objective.needs_teacher:
            student_processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
            self.pairing = pair_up(unwrapped(model), teacher_model, student_processor, self.teacher_processor)
        self.teacher_digest: str | None = None
        if teacher_model is not None and self.args.world_size > 1:
            self.teacher_digest = digest_of(teacher_model, self.args)
        if shard_teacher:
            self.shard_teacher()
        self.in_step = self.args.world_size > 1
        if self.in_step and isinstance(self.data_collator, Collator) and isinstance(processing_class, ProcessorMixin):
            # Where no record of a batch has an image, one of no weight goes through the towers: other processes wait in them.
            blank = blank_sample(processing_class, self.teacher_processor)
            self.data_collator = replace(self.data_collator, blank=blank)
        # The loss is divided by the masses of the whole step already.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.train_sums, self.eval_sums = Sums(), Sums()
        self.step_totals: Masses | None = None
        self.weights_seen: list[dict[str, float]] = []
        """The terms' weights in each step since the last log, where schedules change them."""
        self.draw_step, self.draws, self.eval_draws = -1, 0, 0

    def check_sharding(self) -> None:
        """Refuses training engines under which the loss would be another number (`align_ti.training.engines.check`).

        Raises:
            ConfigError: see there.
        """
        check_engine(
            self,
            on_policy=self.on_policy is not None,
            candidates=self.draws_candidates,
            gradient_shares_every=self.gradient_shares_every,
        )

    def create_optimizer(self, *arguments: Any, **options: Any) -> Optimizer:
        """As in transformers; its arguments are dropped then, since under FSDP 2 they would keep the unsharded weights in memory."""
        made: Optimizer = super().create_optimizer(*arguments, **options)
        self.optimizer_cls_and_kwargs = None
        return made

    def shard_teacher(self) -> None:
        """Spreads the teacher's weights over all processes; no effect with one, or if it is sharded already.

        Raises:
            ModelError: it is quantised, has a place of its own, or does not name its layers.
        """
        teacher = self.teacher_model
        # Of a cached teacher only the head is there, which nothing is gathered for.
        if teacher is None or self.args.world_size == 1 or has_head_only(teacher) or is_sharded(teacher):
            return
        shard(teacher, self.args.device)

    @property
    def shards_weights(self) -> bool:
        """Whether the student's weights are sharded over the processes: FSDP, or ZeRO-3."""
        return shards_weights(self)

    @property
    def steps_differ(self) -> bool:
        """Whether some steps do other work than others, by chance: some batches are on-policy."""
        return self.on_policy is not None

    @property
    def steps_change(self) -> bool:
        """Whether the work of a step changes along training, by the terms' schedules."""
        return self.objective.changes_work

    @property
    def draws_candidates(self) -> bool:
        """Whether a term compares rows of candidates."""
        return candidate_options(self.objective.terms) is not None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in transformers, for conversations too; streams are split over processes so that each record counts once."""
        named: Any = self.eval_dataset
        data = named if eval_dataset is None else named[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if self.splits_stream(data):
            return stream_loader(self, data)
        return super().get_eval_dataloader(encoded(eval_dataset, self.processing_class, self.teacher_processor))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        if self.splits_stream(test_dataset):
            return stream_loader(self, test_dataset)
        return super().get_test_dataloader(encoded(test_dataset, self.processing_class, self.teacher_processor))

    def splits_stream(self, data: Any) -> bool:
        """Whether this trainer splits an evaluation set over the processes: a stream, unless one process distributes the batches."""
        loader: Any = self.args.accelerator_config
        return isinstance(data, IterableDataset) and self.args.world_size > 1 and not loader.dispatch_batches

    # --- the layer that attention is read at ---------------------------------------------------------------------------

    def resolve_layer(self) -> Objective:
        """The objective with a number for the layer of IVA, or of any term that needs one; "auto" is scored once and kept in the output
        folder.

        Raises:
            ConfigError: the training data are no conversations, so that there is nothing to score on.
            DataError: no image has two instructions.
        """
        if not self.objective.needs_layer:
            return self.objective
        assert self.teacher_model is not None
        layer = chosen_layer(
            self.teacher_model,
            self.teacher_processor or self.processing_class,
            self.train_dataset,
            self.scores,
            self.args,
            term=self.objective.needs_layer[0],
            digest=self.teacher_digest,
        )
        self.objective = self.objective.at_layer(layer)
        return self.objective

    # --- the order of records -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """As in transformers; where records are grouped by length, their lengths are known or estimated, not found by decoding all."""
        data = self.train_dataset if train_dataset is None else train_dataset
        # Its name in transformers 5.0, and its name since.
        grouped = getattr(self.args, "group_by_length", False) or (
            getattr(self.args, "train_sampling_strategy", "random") == "group_by_length"
        )
        if grouped and isinstance(data, EncodedConversations):
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return LengthGrouped(data.lengths(), batch, int(seed))
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        return sampler

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As in transformers; measures the time of each step if `phases` was given. On a CPU, freed memory is kept from here on."""
        if self.args.device.type == "cpu":
            keep_freed_memory()
        if self.phases is None:
            return super().train(*arguments, **options)
        assert self.model is not None
        with self.phases.running(filter(None, (unwrapped(self.model), self.teacher_model))):
            return super().train(*arguments, **options)

    # --- one step -----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimizer step, and the masses of the whole step, computed beforehand if it has several batches.

        TPA's mass depends on the candidates, so under accumulation they are drawn here, by a forward pass without gradient.
        """
        if self.phases is not None:
            self.phases.begin_step()
        began = time.perf_counter()
        with phase("data"):
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        with self.counting():
            batches = self.prepared(batches)
        if batches and self.objective.scheduled:
            self.weights_seen.append({name: term.weight for name, term in self.current().terms.items()})
        self.seconds_before_step = time.perf_counter() - began
        step, every = self.state.global_step + 1, self.gradient_shares_every
        if every and batches and (step == 1 or step % every == 0):
            with outside_of_steps():
                self.shares.pending = shares_of(self.gradient_norms(batches))
        return batches, count

    def progress(self) -> float:
        """The fraction of the training steps that lies before the step that is made now; terms' schedules refer to it."""
        return float(self.state.global_step / max(1, self.state.max_steps))

    def current(self, *, training: bool = True) -> Objective:
        """The objective of the step that is made now; in evaluation the one without schedules, so that evaluations compare."""
        objective = self.resolve_layer()
        return objective.at_progress(self.progress()) if training else objective.without_schedules()

    def counting(self) -> AbstractContextManager[None]:
        """A context in which the FLOPs of a step are counted, if they are to be."""
        return nullcontext() if self.work is None else self.work.counting()

    def prepared(self, batches: list[Any]) -> list[Any]:
        """The batches of one optimizer step, some answered by the student, and the step's masses if there are several batches."""
        if self.on_policy is not None:
            batches = [self.perhaps_answered(batch, number, self.on_policy) for number, batch in enumerate(batches)]
        self.step_totals = None
        if len(batches) > 1:
            objective = self.current()
            sums: dict[str, Tensor] = {}
            batches = [self._prepare_inputs(batch) for batch in batches]
            for batch in batches:
                for name, mass in self.known_masses(batch, objective).items():
                    sums[name] = sums.get(name, 0) + mass
            self.step_totals = self.over_processes(sums)
        return batches

    def gradient_norms(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The norm of each term's own gradient, weighted as in the loss, over the batches of an optimizer step on all processes.

        Each term's forward and backward pass runs alone, on the step's own candidates. Gradients, random states and the count of
        draws are restored afterwards, so that the step is the same as without the measurement.
        """
        objective, whole = self.current(), self.accelerator.unwrap_model(self.model)
        parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        scale = FLOAT16_SCALE if self.args.fp16 else 1.0
        place = self.draw_step, self.draws
        # A term that has no weight now has no part in the gradient.
        norms = dict.fromkeys(self.objective.terms, 0.0)
        for name in objective.terms:
            alone = only(objective, name)

            def loss_on(batch: Mapping[str, Any], alone: Objective = alone) -> Callable[[], Tensor]:
                return lambda: self.loss_of(whole, self._prepare_inputs(dict(batch)), alone, training=True).loss * scale

            with preserved(whole):
                whole.train()
                gradients = added_gradients([loss_on(batch) for batch in batches], parameters)
            if self.args.world_size > 1:
                gradients = [self.accelerator.reduce(one, "sum") for one in gradients]
            norms[name] = norm_of(gradients) / scale
            self.draw_step, self.draws = place
        return norms

    def perhaps_answered(self, batch: dict[str, Any], number: int, settings: OnPolicy) -> dict[str, Any]:
        """The batch with this number in the step; with the configured probability, answered by the student.

        The decision depends on seed, step and number alone: all processes answer the same batches, so that none waits for another that
        generates. The sampled tokens differ between processes, as all draws do.
        """
        # A tuple of integers hashes to the same number in every process and Python.
        chance = torch.Generator().manual_seed(hash((self.args.seed, self.state.global_step, number)) % 2**63)
        answered = bool(torch.rand((), generator=chance) < settings.probability)
        one = torch.ones((), device=self.args.device)
        self.train_sums.count("on_policy_share", one * answered, one)
        if not answered:
            return batch
        batch = self._prepare_inputs(batch)
        student = unwrapped(self.accelerator.unwrap_model(self.model))
        with phase("generation"), self.accelerator.autocast():
            rollout = respond(student, batch, settings, self.generator(), self.pairing)
        self.train_sums.count("cut_share", rollout.cut.sum().to(one.device), one * len(rollout.cut))
        return rollout.batch

    def known_masses(self, batch: dict[str, Any], objective: Objective) -> Masses:
        """The masses of one batch; its candidates are drawn and put into it if a term has some."""
        plan, options = None, candidate_options(objective.terms)
        if options is not None:
            student = unwrapped(self.accelerator.unwrap_model(self.model))
            # An evaluation leaves the student in eval mode, and draws would depend on whether there was one.
            student.train()
            with phase("candidates"):
                with self.accelerator.autocast():
                    if "candidates" not in batch:
                        batch["candidates"] = self.candidates_of(student, batch, options)
                plan = plan_candidates(student, batch, batch["candidates"], options, self.pairing)
        return term_masses(objective.terms, Tokens.of(batch), plan)

    def candidates_of(self, student: PreTrainedModel, batch: dict[str, Any], options: CandidateOptions) -> Candidates:
        """Candidates of a batch, drawn before its own pass."""

        def drawn() -> Candidates:
            return candidates_for(student, self.teacher_model, batch, options, self.generator(), self.pairing)

        whole = self.accelerator.unwrap_model(self.model)
        return run_gathered(self.teacher_model, lambda: run_gathered(whole, drawn))

    def over_processes(self, masses: Masses) -> Masses:
        """The masses summed over all processes."""
        if self.args.world_size == 1:
            return masses
        names = list(masses)
        summed = self.accelerator.reduce(
            torch.stack([masses[name].to(widest_float(masses[name].device)) for name in names]), "sum"
        )
        return dict(zip(names, summed, strict=True))

    def generator(self, training: bool = True) -> torch.Generator:
        """A generator for one draw.

        In training it is fixed by seed, step, draw within the step, and process; in evaluation by all of these but the step, so that
        evaluations compare, and training draws the same with and without them.
        """
        if training and self.state.global_step != self.draw_step:
            self.draw_step, self.draws = self.state.global_step, 0
        count = self.draws if training else self.eval_draws
        place = (
            self.args.seed,
            self.state.global_step if training else 0,
            count,
            self.args.process_index,
            int(training),
        )
        if training:
            self.draws += 1
        else:
            self.eval_draws += 1
        # A tuple of integers hashes to the same number in every process and Python.
        return torch.Generator(self.args.device).manual_seed(hash(place) % 2**63)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in transformers: the batch on its device."""
        with phase("data"):
            return super()._prepare_inputs(inputs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in transformers: the loss of one batch, with its gradients accumulated; time outside other phases counts as `backward`."""
        with phase("backward"), self.counting():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of one batch, as its share of the whole optimizer step."""
        training = model.training
        objective = self.current(training=training)
        if self.teacher_processor is not None and objective.needs_teacher and "teacher" not in inputs:
            raise ConfigError(
                "the teacher's processor makes other inputs than the student's, but the batch holds none for it; pass conversations as "
                "the dataset, or give each sample the teacher's own (align_ti.data.lengths.paired)."
            )
        if training and self.work is not None:
            self.work.add(inputs)
        output = self.loss_of(model, inputs, objective, training=training)
        (self.train_sums if training else self.eval_sums).add(output)
        # Data parallelism averages gradients over processes; the sum over processes is meant.
        value = output.loss * self.args.world_size if training else output.loss
        return (value, {"loss": output.loss.detach()}) if return_outputs else value

    def loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], objective: Objective, *, training: bool
    ) -> DistillationOutput:
        """The objective of one batch; in training each term is divided by its mass over the whole optimizer step."""
        whole = self.accelerator.unwrap_model(model)
        student = unwrapped(whole)

        def step_masses(masses: Masses) -> Masses:
            if not training:
                return masses
            return self.step_totals if self.step_totals is not None else self.over_processes(masses)

        def loss() -> tuple[Tensor, DistillationOutput]:
            batch = {name: value for name, value in inputs.items() if name != "candidates"}
            with self.accelerator.autocast():
                made = distillation_loss(
                    student,
                    self.teacher_model,
                    batch,
                    objective,
                    inputs.get("candidates"),
                    self.generator(training),
                    step_masses,
                    self.pairing,
                    in_step=self.in_step,
                )
                return made.loss, made

        def called() -> tuple[Tensor, DistillationOutput]:
            # Called by itself, a model without hooks or wrapper is no more than its loss.
            return loss() if model is whole and not is_sharded(whole) else run_in_forward(model, whole, loss)

        with phase(OTHER):
            # The loss by way of the wrapper, which may have put its hooks on it.
            value, output = run_gathered(self.teacher_model, called)
        return replace(output, loss=value)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """The loss of one evaluation batch; full logits are never computed. Records that only fill the last batch have weight 0."""
        sums, own = self.eval_sums, inputs[OWN_RECORDS] if OWN_RECORDS in inputs else records_of_its_own(self)
        inputs = {name: value for name, value in inputs.items() if name != OWN_RECORDS}
        if own == 0:
            # Read all the same, since other processes may wait in the models' passes.
            self.eval_sums = Sums()
        elif own is not None and own < len(inputs["labels"]):
            inputs = weightless_from(inputs, own)
        with torch.no_grad():
            value = self.compute_loss(model, self._prepare_inputs(inputs))
        if own == 0:
            # Means are taken over the processes term by term, so each has to know the terms.
            for name, mass in self.eval_sums.masses.items():
                sums.count(name, torch.zeros_like(mass), torch.zeros_like(mass))
        self.eval_sums = sums
        return value.detach(), None, None

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in transformers; with adapters also what is trained beside them, which peft does not save."""
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save and not self.shards_weights:
            save_trained(self.model, Path(output_dir or str(self.args.output_dir)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in transformers; under FSDP also what is trained beside adapters: transformers has accelerate save these alone."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel):
            save_trained(self.model, Path(output_dir), write=self.is_world_process_zero())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in transformers, and then by the names in the files: see `reload`."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.reload(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As in transformers, and then by the names in the files: see `reload`."""
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self.reload(self.model, self.state.best_model_checkpoint)

    def reload(self, model: nn.Module | None, checkpoint: str) -> None:
        """The checkpoint's weights, by the names that its files use.

        transformers saves some families (LLaVA among them) under older names than the model's own, and its Trainer then reads the
        file with `strict=False`: no name matches, nothing is loaded, and the run silently starts again from the initial weights
        (observed with 5.23). Loading as `from_pretrained` does maps the names, and a missing weight is an error. Adapters are
        loaded by peft, other trained weights here.
        """
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not isinstance(model, PeftModel)):
            # Their own files are by the names that the model has in memory.
            return
        if isinstance(model, PeftModel):
            load_trained(model, Path(checkpoint))
        if isinstance(model, PreTrainedModel):
            load: Any = type(model).from_pretrained
            saved, info = load(checkpoint, dtype=model.dtype, use_safetensors=True, output_loading_info=True)
            check_loaded(checkpoint, info)
            model.load_state_dict(saved.state_dict())

    # --- the log ------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """As in transformers, with each term's mean over the whole evaluation set among the metrics.

        Records that several processes repeat to fill the last batches up count once.
        """
        self.eval_sums, self.eval_draws = Sums(), 0
        output = super().evaluation_loop(*arguments, **options)
        prefix = options.get("metric_key_prefix", "eval")
        means = self.eval_sums.means(lambda sums: self.accelerator.reduce(sums, "sum"))
        metrics = {**(output.metrics or {}), **{f"{prefix}_{name}": value for name, value in means.items()}}
        # transformers' own mean over batches would depend on their size.
        metrics[f"{prefix}_loss"] = sum(
            term.weight * means[name] for name, term in self.objective.terms.items() if name in means
        )
        return output._replace(metrics=metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with each term unweighted beside its weight.

        Where schedules change weights, the weight is the mean over the steps since the last log, and the value the mean over those
        steps in which the term had weight; without any, the value is left out.
        """
        if "loss" in logs:
            logs |= self.train_sums.means(lambda sums: self.accelerator.reduce(sums, "sum"))
            for name, term in self.objective.terms.items():
                seen = [weights.get(name, 0.0) for weights in self.weights_seen]
                logs[f"{name}_weight"] = fmean(seen) if "weight" in term.schedule and seen else term.weight
            self.weights_seen = []
        super().log(logs, start_time)


def encoded(data: Any, processor: Any, teacher_processor: ProcessorMixin | None = None) -> Any:
    """Conversations as an encoded dataset, for a teacher with a processor of its own too; anything else as it is."""
    if isinstance(data, Sequence) and len(data) and isinstance(data[0], Conversation):
        if processor is None:
            raise ConfigError("conversations need a processor to become tokens; give processing_class.")
        theirs = None if teacher_processor is None else EncodedConversations(data, teacher_processor)
        return EncodedConversations(data, processor, teacher=theirs)
    if isinstance(data, Mapping):
        return {name: encoded(part, processor, teacher_processor) for name, part in data.items()}
    if isinstance(data, EncodedConversations) and teacher_processor is not None and data.teacher is None:
        data.teacher = EncodedConversations(data.conversations, teacher_processor)
    return data
