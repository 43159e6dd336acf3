"""YAML of strangers: plain values only, and aliases that cannot multiply (a "billion laughs")."""

from __future__ import annotations

from typing import Any

import yaml

#: Nodes that the aliases of a text may stand for, all together.
MOST_REPEATED = 100_000


class BoundedLoader(yaml.SafeLoader):
    """Safe loader that refuses an alias inside of what it stands for, and aliases that stand for too much in all."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._repeated = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; count those that an alias stands for."""
        event: Any = self.peek_event()
        node: Any = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            node.size = 1 + sum(inner.size for inner in _members(node))
        elif not hasattr(node, "size"):
            node.size, node.holds_itself = 1, True
        self._repeated += node.size if isinstance(event, yaml.AliasEvent) else 0
        if self._repeated > MOST_REPEATED:
            mark: Any = event.start_mark
            problem = f"aliases stand for more than {MOST_REPEATED:,} values"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Return the value of a node.

        Raises:
            yaml.constructor.ConstructorError: It is a part of itself.
        """
        if hasattr(node, "holds_itself"):
            raise yaml.constructor.ConstructorError(None, None, "found unconstructable recursive node", node.start_mark)
        return super().construct_object(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """Return an integer, in decimal digits only as many as Python can show."""
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > 10_000:
            raise ValueError(f"an integer of {value.bit_length():,} bits")
        return value


BoundedLoader.add_constructor("tag:yaml.org,2002:int", BoundedLoader.construct_yaml_int)


def _members(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
