"""Draw the rooms of the package and their imports, and check the rules of the house: ``make picture``.

Prints the floors and every offence; writes a picture with ``--picture FILE``. Exits with 1 if a rule is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

from import_graph import LONGEST_FILE, LONGEST_FUNCTION, Graph, floors, folders, module_graph, room_graph, violations
from import_graph import circles as circles_of

#: Inches. Width of a room's box with its margin, height of a floor.
BOX, FLOOR = 1.55, 0.95


def by_floor(rooms: Graph) -> dict[int, list[str]]:
    """Map each floor to its rooms, the top floor first."""
    found: dict[int, list[str]] = defaultdict(list)
    for room, floor in floors(rooms).items():
        found[floor].append(room)
    return dict(sorted(found.items(), reverse=True))


def table(modules: Graph) -> str:
    """Return the floors, one line a room, then the figures and the offences."""
    rooms = room_graph(modules)
    lines = []
    if loops := circles_of(rooms):
        lines += [f"rooms in a circle: {', '.join(loop)}" for loop in loops]
    else:
        lines += [f"{'floor':>5}  {'room':<18}  imports"]
        for floor, names in by_floor(rooms).items():
            lines += [f"{floor:>5}  {name:<18}  {', '.join(sorted(rooms[name])) or '-'}" for name in names]
    largest = max(folders().items(), key=lambda item: item[1])
    broken = violations(modules)
    return "\n".join(
        [
            *lines,
            "",
            f"rooms {len(rooms)}, imports between rooms {sum(map(len, rooms.values()))}, modules {len(modules)}, "
            f"imports between modules {sum(map(len, modules.values()))}",
            f"largest folder {largest[0]} ({largest[1]} files)",
            f"offences {len(broken)} (circles, imports upward, files over {LONGEST_FILE} lines, "
            f"functions over {LONGEST_FUNCTION} lines)",
            *broken,
        ]
    )


def positions(rooms: Graph) -> dict[str, tuple[float, float]]:
    """Return the middle of each room's box in inches; the rooms of a floor are side by side, centred."""
    rows = by_floor(rooms)
    widest = max(map(len, rows.values())) * BOX
    found = {}
    for floor, names in rows.items():
        left = (widest - len(names) * BOX) / 2
        for number, name in enumerate(names):
            shift = BOX / 4 * (1 if floor % 2 else -1) if len(names) == 1 else 0.0  # a lone room would hide arrows
            found[name] = (left + (number + 0.5) * BOX + shift, (floor + 0.5) * FLOOR)
    return found


def nearest(rooms: Graph) -> set[tuple[str, str]]:
    """Return the imports that no longer way through other rooms implies (the transitive reduction)."""

    def reach(room: str) -> set[str]:
        return {room}.union(*(reach(other) for other in rooms[room]))

    return {
        (room, other)
        for room, others in rooms.items()
        for other in others
        if not any(other in reach(third) for third in others - {other})
    }


def draw(rooms: Graph, file: str) -> None:
    """Write the picture: boxes on floors; dark arrows for nearest imports, light ones for all others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    middle, close = positions(rooms), nearest(rooms)
    width = max(x for x, _ in middle.values()) + BOX / 2
    height = max(y for _, y in middle.values()) + FLOOR / 2
    figure, axes = pyplot.subplots(figsize=(width, height))
    for room, others in rooms.items():
        for other in others:
            is_close = (room, other) in close
            axes.annotate(
                "",
                xy=middle[other],
                xytext=middle[room],
                zorder=2 if is_close else 1,
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": "#27506e" if is_close else "#d3d9de",
                    "linewidth": 1.1 if is_close else 0.6,
                    "shrinkA": 11,
                    "shrinkB": 13,
                },
            )
    for room, (x, y) in middle.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#eef4f8", "edgecolor": "#27506e"}
        axes.text(x, y, room.lstrip("_"), ha="center", va="center", fontsize=8, bbox=box, zorder=3)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None, "Description": edges(rooms)})
    pyplot.close(figure)


def edges(rooms: Graph) -> str:
    """Return every import between rooms as text; the picture carries it, so that a test can tell a stale one."""
    return "; ".join(f"{room}: {' '.join(sorted(others))}" for room, others in sorted(rooms.items()))


def main() -> int:
    """Print the table, write the picture if asked, and return 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description="draw the rooms and their imports, and check the rules of the house")
    parser.add_argument("--picture", metavar="FILE", help="write a PNG")
    file = parser.parse_args().picture
    modules = module_graph()
    print(table(modules))
    if file:
        draw(room_graph(modules), file)
    return bool(violations(modules))


if __name__ == "__main__":
    sys.exit(main())
