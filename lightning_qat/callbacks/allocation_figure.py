"""How an allocation of bits is shown: a table in Markdown, and a heat map."""

import math

from matplotlib.figure import Figure

from lightning_qat.conversion.allocation import Allocation


def markdown(allocation: Allocation) -> str:
    """Return the table of an allocation in Markdown, its caption below."""
    head, *rows = allocation.rows
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("*", " **\\***") for cell in line] for line in lines]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in cells), "", allocation.caption])


def draw_allocation(allocation: Allocation) -> Figure:
    """Return the sensitivities as a heat map of layers and candidates, the chosen ones framed.

    Colors are logarithmic over four decades below the largest; where the change is none or an improvement, the
    darkest.
    """
    layers, labels = allocation.layers, [spec.grid.label for spec in allocation.specs[0]]
    largest = max((cost for row in allocation.sensitivities for cost in row if cost > 0), default=1.0)
    top = math.log10(largest)
    colors = [[max(math.log10(c), top - 4) if c > 0 else top - 4 for c in row] for row in allocation.sensitivities]
    figure = Figure(figsize=(3.5 + 0.8 * len(labels), 1.4 + 0.26 * len(layers)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.pcolormesh(colors, cmap="magma", vmin=top - 4, vmax=top)
    for row, (costs, chosen) in enumerate(zip(allocation.sensitivities, allocation.chosen, strict=True)):
        for column, cost in enumerate(costs):
            shade = "black" if colors[row][column] > top - 1.2 else "white"
            axes.text(column + 0.5, row + 0.5, f"{cost:.1e}", ha="center", va="center", fontsize=7, color=shade)
        frame = [chosen + 0.04, chosen + 0.96, chosen + 0.96, chosen + 0.04, chosen + 0.04]
        axes.plot(frame, [row + y for y in (0.08, 0.08, 0.92, 0.92, 0.08)], color="deepskyblue", linewidth=2)
    axes.set_xticks([column + 0.5 for column in range(len(labels))], labels, fontsize=9)
    axes.set_yticks([row + 0.5 for row in range(len(layers))], [" = ".join(names) for names in layers], fontsize=9)
    axes.invert_yaxis()
    axes.set_title(f"{allocation.measure}; chosen: {allocation.average_bits:.2f} bits per weight", fontsize=9)
    figure.colorbar(image, ax=axes, label="log10")
    return figure
