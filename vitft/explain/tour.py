"""A tour of a ViT in words, with its own sizes: from pixels to logits, for readers who have never seen one."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vitft.io.console import percent
from vitft.spec import ViTSpec, stages, total


def tour(spec: ViTSpec) -> Group:
    """The steps of a plain ViT: what each does and why, and its stages in the table."""
    steps = Table.grid(padding=(0, 2, 0, 0))
    steps.add_column(justify="right", style="bold cyan", no_wrap=True)
    steps.add_column(style="bold", no_wrap=True)
    steps.add_column(overflow="fold", max_width=92)
    for number, (name, stage_names, words) in enumerate(_steps(spec), 1):
        steps.add_row(str(number), name, Text.assemble(words, (f"  [{stage_names}]", "dim")))
        steps.add_row()
    title = Text("How a Vision Transformer turns an image into an answer\n", "bold")
    return Group(title, steps, Text("Stage by stage:\n", "bold"))


def _steps(spec: ViTSpec) -> list[tuple[str, str, str]]:
    """(name, stages in the table, explanation) of each step."""
    pixels = spec.channels * spec.image_height * spec.image_width
    in_patch = spec.channels * spec.patch_height * spec.patch_width
    rows, columns = spec.grid
    attention, mlp = (_parameter_fraction(spec, part) for part in (".attention.", ".mlp."))
    return [
        ("cut", "image", (
            f"An image has {spec.image_height}×{spec.image_width} pixels in {spec.channels} color channels: {pixels:,} "
            f"numbers. It is cut into {rows}×{columns} patches of {spec.patch_height}×{spec.patch_width} pixels, "
            f"{in_patch} numbers each. Patches are to this model what words are to a language model.")),
        ("embed", "embed.projection, embed.patches", (
            f"One learned matrix turns each patch into a token: {spec.width} numbers that describe what is in this "
            f"square. It is the same matrix for all {spec.patches}, so an edge looks the same wherever it is.")),
        ("prepend", "embed.class_token", (
            "One more token is put in front, the class token. It is learned, and the same for every image. It will "
            "collect what the answer needs.")),
        ("locate", "embed.positions", (
            f"To each of the {spec.tokens} tokens, the learned numbers of its position are added. The next step "
            "ignores the order of tokens: without positions, a shuffled image would be the same image.")),
        ("attend", "attention.*", (
            "Every token asks all tokens. It computes a query (what am I looking for?), a key (what do I have?) and a "
            f"value (what do I pass on?), in {spec.heads} heads of {spec.head_width} numbers. The better its query "
            "matches another token's key, the more of that token's value it takes: softmax(q · k / "
            f"√{spec.head_width}) gives weights that sum to 1, {spec.tokens}×{spec.tokens} of them per head. The "
            "result is added to the token.")),
        ("transform", "mlp.*", (
            f"Then each token on its own: a linear layer to {spec.mlp} numbers, a non-linear function (GELU lets high "
            f"numbers pass and holds low ones back), and a linear layer back to {spec.width}. This is added, too.")),
        ("repeat", f"blocks 1-{spec.layers}", (
            f"Attention and MLP together are one block. There are {spec.layers}, each with its own weights. The deeper "
            "the block, the farther its tokens look (Dosovitskiy et al. 2020, figure 7). "
            f"{percent(attention, 0)} of all weights are in attention, {percent(mlp, 0)} in the MLPs.")),
        ("answer", "norm, pool, head", (
            f"Only the class token goes on, to one last matrix: {spec.classes} logits, one per class. The largest is "
            "the answer; softmax turns the logits into probabilities.")),
    ]  # fmt: skip


def _parameter_fraction(spec: ViTSpec, part: str) -> float:
    """The fraction of all parameters that are in stages with this part in their name."""
    return sum(stage.parameters for stage in stages(spec) if part in stage.name) / total(spec).parameters


def next_steps() -> Text:
    """Where to go from here."""
    return Text.assemble(
        "\nWith real numbers: ", ("vitft explain --image FILE", "bold"), "; add ", ("--html page.html", "bold"),
        " to explore them in a browser.\nThe code of every step, with its gradients: docs/textbook.md. A whole ViT "
        "that learns in seconds: ", ("vitft scratch train scalar", "bold"),
    )  # fmt: skip
