"""Rows of logits that are taken at a time."""

import pytest

from gkd_dsl.tiles import TILE_BYTES, rows_of_tile


def tiles(rows, vocabulary=151936, element=2, device="cuda"):
    size = rows_of_tile(rows, vocabulary, element, device)
    return [min(size, rows - start) for start in range(0, rows, size)]


def test_on_a_gpu_they_are_about_equal_and_have_multiples_of_128_rows():
    assert tiles(1000) == [512, 488]
    assert tiles(1024) == [512, 512]
    assert tiles(1048) == [384, 384, 280]
    assert tiles(1024, element=4) == [256] * 4
    assert tiles(300, 2**22) == [128, 128, 44]
    assert tiles(0) == []
    # Of a type that is not known: it is no CPU.
    assert tiles(1000, device="xpu") == tiles(1000)


@pytest.mark.parametrize("words", [2000, 32000, 151936])
def test_on_a_gpu_there_are_two_where_there_are_rows_for_two(words):
    assert tiles(200, words) == [200]
    assert tiles(255, words) == [255]
    assert tiles(256, words) == [128, 128]
    assert tiles(512, words) == [256, 256]
    assert tiles(500, words) == [256, 244]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("words", [50, 32000, 151936, 2**22])
@pytest.mark.parametrize("rows", [1, 127, 1000, 8192])
def test_all_rows_are_in_one_and_none_is_too_large(rows, words, device):
    found = tiles(rows, words, 4, device)
    assert sum(found) == rows
    least = 1 if device == "cpu" else 128
    assert max(found) <= max(least, TILE_BYTES[device] // (4 * words))
    assert len(set(found[:-1])) <= 1
