"""Memory and traffic of a LoRA training on many GPUs, computed from shapes: python scripts/scale.py

The tables of docs/scale.md are printed by this script; a test compares them. Nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder with gated feed-forward networks."""

    name: str
    hidden: int
    inner: int
    layers: int
    key_value: int  # width of keys, and of values
    vocabulary: int

    def linears(self) -> list[tuple[int, int]]:
        """Return [out, in] of each linear layer of a block."""
        h, kv, n = self.hidden, self.key_value, self.inner
        return [(h, h), (kv, h), (kv, h), (h, h), (n, h), (n, h), (h, n)]

    def layer_parameters(self) -> int:
        """Return the parameters of one block."""
        return sum(out * width for out, width in self.linears())

    def parameters(self) -> int:
        """Return all parameters, with embedding and head."""
        return self.layers * self.layer_parameters() + 2 * self.vocabulary * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Return the parameters of an adapter on every linear layer."""
        return self.layers * sum(rank * (out + width) for out, width in self.linears())


@dataclass(frozen=True)
class Cluster:
    """GPUs and the links between them.

    Attributes:
        node_rate: Bytes per second that the network cards of a node carry together.
        gpu_rate: Bytes per second between GPUs of a node.
        flops: Operations per second that a GPU reaches on these products: an assumption, 40 % of 989 TFLOP/s.
    """

    gpus: int = 64
    per_node: int = 8
    node_rate: float = 8 * 50e9
    gpu_rate: float = 450e9
    flops: float = 4e14


LLAMA_70B = Shape("Llama 70B", 8192, 28672, 80, 1024, 128256)
#: Bytes of a weight in 8 bits with its scales: one fp32 number for each row and column, and a few columns in fp32.
WEIGHT = 1.005
#: Bytes for each trained parameter: fp32 weight, gradient, two moments.
TRAINED = 16


def layer_bytes(shape: Shape) -> float:
    """Return the bytes of a block in 8 bits."""
    return shape.layer_parameters() * WEIGHT


def memory(shape: Shape, gpus: int, rank: int, tokens: int) -> dict[str, float]:
    """Return the bytes in one GPU by kind, with gradient checkpointing of every layer.

    Args:
        shape: The base.
        gpus: GPUs over which its layers are sharded; 1: each holds all.
        rank: Rank of the adapter on all linear layers.
        tokens: Tokens of a pass.
    """
    gathered = 2 * layer_bytes(shape) if gpus > 1 else 0.0
    recomputed = sum(out for out, _ in shape.linears()) + 6 * shape.hidden
    return {
        "layers": shape.layers * layer_bytes(shape) / gpus,
        "embedding and head": 2 * shape.vocabulary * shape.hidden * WEIGHT,
        "two gathered layers": gathered,
        "adapter, gradient, moments": TRAINED * shape.adapter_parameters(rank),
        "inputs of layers": 2.0 * tokens * shape.hidden * shape.layers,
        "one layer again": 2 * 2.0 * tokens * recomputed,
    }


def gather_bytes(shape: Shape) -> float:
    """Return the bytes that a pass brings to each GPU: every layer forward, and again backward."""
    return 2 * shape.layers * layer_bytes(shape)


def adapter_bytes(shape: Shape, rank: int, gpus: int) -> float:
    """Return the bytes that a GPU sends for one step: a ring of the adapter's fp32 gradients."""
    return 2 * (gpus - 1) / gpus * 4 * shape.adapter_parameters(rank)


def compute_seconds(shape: Shape, tokens: int, flops: float) -> float:
    """Return the time of a pass: forward, forward again, and the input's gradient; frozen weights get none."""
    return 6 * shape.parameters() * tokens / flops


def efficiency(shape: Shape, cluster: Cluster, tokens: int, over: int) -> tuple[float, float]:
    """Return the share of a pass that computes, where gathers do not overlap with products, and where all do.

    Args:
        shape: The base.
        cluster: The GPUs.
        tokens: Tokens of a pass and GPU.
        over: GPUs over which a base is sharded. All cards of a node share what comes from other nodes.
    """
    rate = min(cluster.node_rate, cluster.gpu_rate) if over > cluster.per_node else cluster.gpu_rate
    compute, gather = compute_seconds(shape, tokens, cluster.flops), gather_bytes(shape) / rate
    return compute / (compute + gather), compute / max(compute, gather)


def break_even(shape: Shape, cluster: Cluster) -> float:
    """Return the tokens of a pass and GPU at which gathering takes as long as computing."""
    rate = min(cluster.node_rate, cluster.gpu_rate)
    return gather_bytes(shape) / rate / compute_seconds(shape, 1, cluster.flops)


def memory_table(shape: Shape = LLAMA_70B, rank: int = 16, tokens: int = 4096) -> str:
    """Return the memory of one GPU as a table: DDP, and sharded over 8 and over 64."""
    columns = [memory(shape, gpus, rank, tokens) for gpus in (1, 8, 64)]
    rows = [[name, *(f"{column[name] / 1e9:.1f}" for column in columns)] for name in columns[0]]
    rows.append(["sum", *(f"{sum(column.values()) / 1e9:.1f}" for column in columns)])
    return _table(["GB in each GPU", "DDP", "sharded over 8", "sharded over 64"], rows)


def traffic_table(shape: Shape = LLAMA_70B, rank: int = 16, tokens: int = 4096) -> str:
    """Return time and efficiency of 64 GPUs by their links."""
    links = {
        "8 cards of 400 Gb/s a node": 8 * 50e9,
        "1 card of 400 Gb/s a node": 50e9,
        "1 card of 100 Gb/s a node": 12.5e9,
        "1 card of 25 Gb/s a node": 3.125e9,
    }
    rows = []
    for name, rate in links.items():
        cluster = Cluster(node_rate=rate)
        apart, overlapped = efficiency(shape, cluster, tokens, cluster.gpus)
        rows.append(
            [
                name,
                f"{gather_bytes(shape) / min(rate, cluster.gpu_rate):.2f}",
                f"{adapter_bytes(shape, rank, cluster.gpus) / rate:.3f}",
                f"{apart:.0%} to {overlapped:.0%}",
                f"{break_even(shape, cluster):,.0f}",
            ]
        )
    head = ["link", "gathers of a pass, s", "adapter's gradients of a step, s", "efficiency", "break-even, tokens"]
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both tables and the time of a pass."""
    print(memory_table(), traffic_table(), sep="\n\n")
    print(f"\ncompute of a pass of 4,096 tokens: {compute_seconds(LLAMA_70B, 4096, Cluster().flops):.2f} s")
    print(f"adapter: {LLAMA_70B.adapter_parameters(16) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
