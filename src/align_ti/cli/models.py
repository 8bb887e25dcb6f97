"""The verbs about one model: put together, imported, its layers scored, talked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from align_ti.cli.terminal import console, quiet
from align_ti.config import Composition, Scores
from align_ti.errors import DataError

if TYPE_CHECKING:
    from align_ti.checkpoints.parts import Made


def compose(
    vision: Annotated[str, typer.Option(help="A folder or hub name of a SigLIP or CLIP checkpoint.")],
    text: Annotated[str, typer.Option(help="A folder or hub name of a causal language model.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    feature_layer: Annotated[
        int, typer.Option(help="The tower's hidden state that the projector reads; -1: after the last layer.")
    ] = -2,
    select_strategy: Annotated[
        str | None,
        typer.Option(help="full, or default: without the first position. By default depends on the type of tower."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the language model's), float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the projector.")] = 0,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A Jinja file, or vicuna. By default the language model's own, extended for images."),
    ] = None,
) -> None:
    """Compose a new LLaVA model from a vision tower, a new projector and a language model."""
    options: dict[str, Any] = {
        "vision": vision,
        "text": text,
        "out": str(out),
        "feature_layer": feature_layer,
        "select_strategy": select_strategy,
        "dtype": dtype,
        "seed": seed,
        "chat_template": chat_template,
    }
    checked = Composition(**options)
    quiet()
    from align_ti.checkpoints.compose import compose as put_together

    with console.status("composing"):
        made = put_together(checked)
    show_made(made)


def import_checkpoint(
    path: Annotated[str, typer.Argument(help="A folder or hub name of a checkpoint published by the paper's authors.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    vision_tower: Annotated[
        str | None,
        typer.Option(help="The SigLIP tower's folder or hub name; by default the one that the checkpoint names."),
    ] = None,
    own_tower: Annotated[
        bool, typer.Option("--own-tower", help="Use the tower weights in the checkpoint instead of the folder's.")
    ] = False,
) -> None:
    """Convert a checkpoint in the authors' own format into a folder that plain transformers loads."""
    quiet()
    from align_ti.checkpoints.released import import_released

    with console.status("importing"):
        made = import_released(path, out, vision_tower, own_tower=own_tower)
    show_made(made)


def show_made(made: Made) -> None:
    """What was written, as a table."""
    table = Table("item", "value", title=str(made.folder))
    for part, count in made.parameters.items():
        table.add_row(part, f"{count / 1e6:.2f} M parameters")
    table.add_row("precision", made.dtype)
    table.add_row("image token", str(made.image_token))
    table.add_row("visual tokens per image", str(made.visual_tokens))
    table.add_row("end-of-turn token ids", ", ".join(map(str, made.end_tokens)))
    console.print(table)
    for note in made.notes:
        console.print(note, markup=False, highlight=False)


def score_layers(
    model: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model, usually the teacher.")],
    data: Annotated[Path, typer.Argument(help="A LLaVA-format file with several instructions per image.")],
    images: Annotated[Path | None, typer.Option(help="The root folder of image names.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Number of images in the sample.")] = 64,
    instructions: Annotated[int, typer.Option(min=2, help="Instructions per image.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Score how much each layer's attention to an image changes with the instruction (IRS, instruction-relevance score).

    The layer with the highest score is the one that objective.iva.layer=auto uses.
    """
    quiet()
    from align_ti.data.sources import read_conversations
    from align_ti.pipeline.measuring import score_teacher
    from align_ti.runs import write_json

    with console.status("scoring layers"):
        scores = score_teacher(
            model, read_conversations(data, images), Scores(images=pictures, instructions=instructions), seed
        )
    best = max(scores, key=lambda layer: scores[layer])
    table = Table("layer", "IRS", "")
    for layer, score in scores.items():
        table.add_row(
            str(layer),
            f"{score:.4f}",
            "█" * round(40 * score / max(*scores.values(), 1e-9)) + (" ←" if layer == best else ""),
        )
    console.print(table)
    if out is not None:
        write_json(out, {"layer": best, "scores": {str(layer): score for layer, score in scores.items()}})


def chat(
    student: Annotated[str, typer.Argument(help="A folder or hub name of a vision-language model.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image to ask about. May be repeated.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Also ask this model, for comparison.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Ask this question and end; otherwise questions are read until Ctrl-D.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of one answer.")] = 256,
) -> None:
    """Ask a model questions about images, together with its teacher if one is named.

    Each model keeps its own conversation history. The images go with the first question.
    """
    quiet()
    from align_ti.pipeline.measuring import open_chats

    models = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    chats = dict(zip(models, open_chats(list(models.values()), image or [], max_new_tokens), strict=True))
    if question is not None:
        ask_each(chats, question)
        return
    console.print("Type a question; Ctrl-D ends the chat.")
    while True:
        try:
            text = console.input("\nyou: ").strip()
        except EOFError:
            console.print()
            return
        if text:
            try:
                ask_each(chats, text)
            except DataError as error:
                # One question that cannot be asked is no end of the conversation.
                console.print(Text(str(error), style="red"))


def ask_each(chats: Mapping[str, Any], question: str) -> None:
    """Print each model's answer under its name, as plain text whatever is in it."""
    from align_ti.evaluation.chat import visible

    for name, one in chats.items():
        with console.status(f"{name} answers"):
            answer, cut = one.ask(question)
        console.print(Text.assemble((f"{name}: ", "bold"), visible(answer) or "(an empty answer)"), soft_wrap=True)
        if cut:
            console.print(f"(truncated at {one.max_new_tokens} tokens; raise --max-new-tokens)")
