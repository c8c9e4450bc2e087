import pytest

from gkd_dsl.planning import units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 * 2**30),
        ("40GB", 40 * 10**9),
        ("1.5 TiB", int(1.5 * 2**40)),
        ("512gib", 512 * 2**30),
        ("7MB", 7 * 10**6),
        ("1_000.5GiB", int(1000.5 * 2**30)),
    ],
)
def test_memory(text, size):
    assert units.memory(text) == size


def test_rates():
    assert units.rate("50GB/s") == 50e9
    assert units.speed("312 TFLOP/s") == 312e12


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (units.memory, "40", "no unit; write for example 40GiB"),
        (units.memory, "GiB", "is not an amount of memory; write for example 40GiB"),
        (units.memory, "40Gb/s", "'Gb/s' in '40Gb/s' is not the unit of an amount of memory"),
        (units.memory, "0GiB", "is nothing"),
        (units.memory, "0.1B", "is nothing"),
        (units.memory, "", "is not an amount of memory; write for example 40GiB"),
        (units.memory, "1.2.3GiB", "is not an amount of memory; write for example 40GiB"),
        (units.memory, "9" * 400 + "GiB", "an amount of memory of 400 digits is none"),
        (units.rate, "50GB", "write one of B/s"),
        (units.speed, "300", "300TFLOP/s"),
    ],
)
def test_what_cannot_be_read_says_what_to_write(read, text, words):
    with pytest.raises(units.UnitError, match=words.replace("/", "/")):
        read(text)


def test_words():
    assert [units.in_bytes(n) for n in (0, 12, 2**30, 1.5 * 2**20, 200 * 2**30)] == [
        "0",
        "12 B",
        "1.0 GiB",
        "1.5 MiB",
        "200 GiB",
    ]
    assert [units.in_seconds(s) for s in (3.3e-8, 3e-5, 0.0351, 2.81, 300)] == [
        "33 ns",
        "30.0 us",
        "35.1 ms",
        "2.8 s",
        "5.0 min",
    ]
    assert [units.in_count(n) for n in (1234, 124_400_000, 405_853_388_800)] == ["1,234", "124.4M", "405.9B"]
