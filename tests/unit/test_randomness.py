"""What is drawn ahead is given out once, and from the source that it was given."""

from appliance.randomness import DrawnAhead, RandomIds


def test_no_byte_is_given_out_twice_and_each_in_its_order() -> None:
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return len(asked).to_bytes(2, "big") * (count // 2)

    drawn = DrawnAhead(source)
    given = [drawn(32) for _ in range(200)]
    assert given == [b"\0\1" * 16] * 128 + [b"\0\2" * 16] * 72
    assert drawn(10_000) == b"\0\3" * 5_000, "more than is ever drawn ahead"
    assert asked == [4096, 4096, 10_000]
    assert drawn(2) == b"\0\4"


def test_identifiers_are_not_given_out_twice() -> None:
    new_id = RandomIds()
    made = [new_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in made)
