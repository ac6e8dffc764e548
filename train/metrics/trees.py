"""Tree edit accuracy of nested output: max(0, 1 - TED(prediction, reference) / TED({}, reference)).

TED is the distance of Zhang and Shasha (1989) with cost 1 for each node inserted, removed or
renamed. The tree of a value: an object's keys are nodes in sorted order, a list's items stand below
their key in order (an object in a list is a node of its own), a text is a leaf.
"""

import json
from typing import Any

import zss

from train.metrics.normalize import DEFAULT_OPTIONS, NormalizeOptions, normalize


def tree_edit_accuracy(
    reference: Any, prediction: Any, options: NormalizeOptions = DEFAULT_OPTIONS
) -> float:
    """Return the accuracy in [0, 1]; leaves are equal if their normalised texts are.

    An empty reference gives 1 if the prediction is empty too, else 0.
    """
    expected = _tree(reference, options)
    found = _tree(prediction, options)
    scale = _size(expected) - 1  # from the bare root every other node is one insertion
    distance = zss.simple_distance(found, expected, label_dist=_rename_cost)
    if scale == 0:
        return 1.0 if distance == 0 else 0.0
    return max(0.0, 1 - distance / scale)


def _tree(value: Any, options: NormalizeOptions) -> zss.Node:
    root = zss.Node(("object", ""))
    _grow(root, value, options)
    return root


def _grow(node: zss.Node, value: Any, options: NormalizeOptions) -> None:
    if isinstance(value, dict):
        for key in sorted(value):
            if value[key] not in (None, "", [], {}):
                child = zss.Node(("key", str(key)))
                _grow(child, value[key], options)
                node.addkid(child)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                child = zss.Node(("object", ""))
                _grow(child, item, options)
                node.addkid(child)
            else:
                _grow(node, item, options)
    elif value is not None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        node.addkid(zss.Node(("text", normalize(text, options))))


def _size(node: zss.Node) -> int:
    return 1 + sum(_size(child) for child in node.children)


def _rename_cost(first: object, second: object) -> int:
    """Return 0 for equal labels; zss passes "" for a missing side."""
    return int(first != second)
