"""A ViT in words, with its own numbers: from pixel to logit, for those who have never seen one."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vitft.io.console import percent
from vitft.spec import ViTSpec, stages, total


def tour(spec: ViTSpec) -> Group:
    """Each step of a plain ViT: its name, what it does and why, and the stages of the table that it is."""
    steps = Table.grid(padding=(0, 2, 0, 0))
    steps.add_column(justify="right", style="bold cyan", no_wrap=True)
    steps.add_column(style="bold", no_wrap=True)
    steps.add_column(overflow="fold", max_width=92)
    for number, (name, of_table, words) in enumerate(_steps(spec), 1):
        steps.add_row(str(number), name, Text.assemble(words, (f"  [{of_table}]", "dim")))
        steps.add_row()
    title = Text("How a Vision Transformer gets from a picture to an answer\n", "bold")
    return Group(title, steps, Text("The same, stage by stage:\n", "bold"))


def _steps(spec: ViTSpec) -> list[tuple[str, str, str]]:
    pixels = spec.channels * spec.image_height * spec.image_width
    in_patch = spec.channels * spec.patch_height * spec.patch_width
    rows, columns = spec.grid
    parts = {part: _share(spec, part) for part in (".attention.", ".mlp.")}
    return [
        ("cut", "image", (
            f"A picture is {spec.image_height}×{spec.image_width} pixels in {spec.channels} colours: {pixels:,} "
            f"numbers. It is cut into {rows}×{columns} patches of {spec.patch_height}×{spec.patch_width} pixels, "
            f"{in_patch} numbers each. A patch is to this model what a word is to a model of language.")),
        ("embed", "embed.projection, embed.patches", (
            f"One learned matrix turns each patch into a token: {spec.width} numbers that say what is in this square. "
            f"It is the same matrix for all {spec.patches}, so an edge is an edge wherever it is.")),
        ("gather", "embed.class_token", (
            "One more token goes before them, the class token. It is learned, and the same for every picture; it will "
            "collect what the answer needs.")),
        ("place", "embed.positions", (
            f"To each of the {spec.tokens} tokens its place's own learned numbers are added. The next step takes them "
            "in any order: without their places a shuffled picture would be the same picture.")),
        ("attend", "attention.*", (
            "Every token asks all others. It makes a query (what I look for), a key (what I have) and a value (what I "
            f"tell), in {spec.heads} heads of {spec.head_width} numbers. Where a query meets a key that fits, more of "
            f"that token's value comes in: softmax(q · k / √{spec.head_width}) makes shares that sum to 1, "
            f"{spec.tokens}×{spec.tokens} of them a head. What came in is added to the token.")),
        ("think", "mlp.*", (
            f"Then each token by itself: widened to {spec.mlp} numbers, bent (GELU: high ones pass, low ones are held "
            f"back), and narrowed to {spec.width}. This too is added.")),
        ("repeat", f"blocks 1-{spec.layers}", (
            f"Attending and thinking are one block. There are {spec.layers}, each with weights of its own: the deeper, "
            "the farther its tokens look (Dosovitskiy et al. 2020, figure 7). "
            f"{percent(parts['.attention.'], 0)} of all weights are in their attention, "
            f"{percent(parts['.mlp.'], 0)} in their mlp.")),
        ("answer", "norm, pool, head", (
            f"The class token alone goes on, to one last matrix: {spec.classes} logits, one a class. The largest is "
            "the answer; exp of each, divided by their sum, are the probabilities.")),
    ]  # fmt: skip


def _share(spec: ViTSpec, part: str) -> float:
    """Of all parameters, those in stages of this part."""
    return sum(stage.parameters for stage in stages(spec) if part in stage.name) / total(spec).parameters


def further() -> Text:
    """Where to go from here."""
    return Text.assemble(
        "\nWith real numbers: ", ("vitft explain --image FILE", "bold"), ", and add ", ("--html page.html", "bold"),
        " to explore them in a browser.\nThe code of every step, and its gradients: docs/textbook.md. A whole ViT that "
        "learns, in seconds: ", ("vitft scratch train scalar", "bold"),
    )  # fmt: skip
