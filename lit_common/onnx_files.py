"""What all exports to ONNX share."""

from __future__ import annotations

from typing import Any

__all__ = ["strip_notes"]


def strip_notes(model: Any) -> None:
    """Leave out what the exporter notes beside each node and value: source lines, with the paths of this machine."""
    graph = model.graph
    for group in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for item in group:
            del item.metadata_props[:]
            item.doc_string = ""
    for item in (graph, *model.functions):
        del item.metadata_props[:]
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]
