"""The table of tile sizes: how an entry is found, and that the file's entries are sound."""

from __future__ import annotations

import pytest

from pallas_kernels import tiles
from pallas_kernels.grouped_matmul import GroupedTile, misfit

TABLE = {
    "h100": {
        "op": [
            {"when": {"n": 4, "rows": [1, 8]}, "tile": {"size": 1}},
            {"when": {"n": 4}, "tile": {"size": 2}},
            {"when": {"dtype": "bfloat16"}, "tile": {"size": 3}},
        ]
    },
    "h200": {"op": [{"when": {}, "tile": {"size": 9}}]},
}


@pytest.mark.parametrize(
    ("device", "key", "size"),
    [
        ("h100", {"n": 4, "rows": 1, "dtype": "bfloat16"}, 1),
        ("h100", {"n": 4, "rows": 8, "dtype": "bfloat16"}, 1),
        ("h100", {"n": 4, "rows": 9, "dtype": "bfloat16"}, 2),
        ("h100", {"n": 5, "rows": 1, "dtype": "bfloat16"}, 3),
        ("h100", {"n": 5, "rows": 1, "dtype": "float32"}, None),
        ("h200", {"n": 5, "rows": 1, "dtype": "float32"}, 9),
        ("unknown", {"n": 4, "rows": 1, "dtype": "float32"}, 1),
    ],
)
def test_the_first_entry_that_holds_is_found(monkeypatch, device, key, size):
    monkeypatch.setattr(tiles, "table", lambda: TABLE)
    found = tiles.find(device, "op", **key)
    assert (found and found["size"]) == size


def test_an_operation_without_entries_has_no_tile(monkeypatch):
    monkeypatch.setattr(tiles, "table", lambda: TABLE)
    assert tiles.find("h100", "other", n=4) is None


def test_a_condition_on_what_is_not_in_the_key_is_an_error(monkeypatch):
    monkeypatch.setattr(tiles, "table", lambda: TABLE)
    with pytest.raises(KeyError, match="n"):
        tiles.find("h100", "op", rows=1)


def test_the_file_has_grouped_tiles_that_fit():
    for device in tiles.table().values():
        for entry in device["grouped_matmul"]:
            tile, when = GroupedTile(**entry["tile"]), entry["when"]
            if tile.kernel != "triton":
                assert when["backend"] == "mosaic"
                shape = when["experts"], when["n"], when["k"]
                assert misfit(tile, shape, when["dtype"], None) == ""
