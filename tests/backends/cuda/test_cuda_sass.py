"""What is read from machine code, on a listing written by hand: nvdisasm itself is not needed."""

import pytest
from cuda_on_cpu import sass


def listing(*rows):
    """nvdisasm's text of one kernel. A row: a label; or an operation, its operands, cycles until the next may issue,
    the scoreboard that it sets or 7, the scoreboards that it waits for; perhaps the one that it sets when it has read
    its operands."""
    lines, place = ["\t.section\t.text.k", ".text.k:"], 0
    for row in rows:
        if isinstance(row, str):
            lines.append(f"{row}:")
            continue
        op, operands, stall, sets, waits, *read = row
        control = (stall | sets << 5 | (*read, 7)[0] << 8 | sum(1 << k for k in waits) << 11) << 41
        lines.append(f"        /*{place:04x}*/        {op} {operands} ;      /* 0x{place:016x} */")
        lines.append(f"                               /* 0x{control:016x} */")
        place += 16
    return "\n".join([*lines, "//------ .nv.info", *lines])


TIME_LOOP = (
    ".L_x_0",
    ("LDG.E.64.STRONG.GPU", "R2, [R4]", 1, 0, ()),
    ".L_x_1",
    ("ISETP.NE", "P0, R2, R3", 5, 7, (0,)),
    ("@!P0 BRA", "`(.L_x_2)", 5, 7, ()),
    ("LDG.E.64.STRONG.GPU", "R2, [R4]", 1, 0, ()),
    ("BRA", "`(.L_x_1)", 5, 7, ()),
    ".L_x_2",
    ("FFMA", "R5, R2, R6, RZ", 4, 7, (0,)),
    ("MUFU.EX2", "R5, R5", 1, 1, ()),
    ("FADD", "R5, R5, 1", 4, 7, (1,)),
    ("BAR.SYNC", "0x0", 1, 7, ()),
    ("STG.E.64.STRONG.GPU", "[R8], R5", 2, 2, ()),
    ("@P1 BRA", "`(.L_x_0)", 5, 7, ()),
)


def test_instructions_with_their_timing():
    found, jumps = sass.instructions(listing(*TIME_LOOP, ("EXIT", "", 5, 7, ())), "k")
    assert [one.op for one in found][:2] == ["LDG.E.64.STRONG.GPU", "ISETP.NE"] and len(found) == 12
    assert (
        found[0].sets == (0, None) and found[1].waits == (0,) and found[1].stall == 5 and found[1].sets == (None, None)
    )
    assert jumps == [(2, 5), (4, 1), (10, 0)]
    body, inner = sass.time_loop(found, jumps)
    assert len(body) == 9 and inner == [(1, 3)]  # without the second poll: as if the first had found everything


@pytest.mark.parametrize("hop", [400, 1200])
def test_a_turn_takes_as_long_as_its_waits(hop):
    body, _ = sass.time_loop(*sass.instructions(listing(*TIME_LOOP), "k"))
    timing = sass.timing(body, hop)
    # from the store to its being seen; the check, the way out, FFMA; MUFU's result; FADD, the barrier
    assert timing.cycles == hop + 5 + 5 + 4 + sass.LATENCY["MUFU"] + 4 + sass.LATENCY["BAR"]
    assert timing.waits == 2


def test_who_overwrites_an_address_waits_until_it_is_read_and_not_for_the_number():
    loop = (("LDG.E", "R2, [R4]", 1, 0, (), 1), ("IADD3", "R4, R4, 4", 4, 7, (1,)), ("FADD", "R5, R2, R5", 4, 7, (0,)))
    for count, cycles in ((2, sass.READ + 4), (3, sass.LATENCY["LDG"] + 4)):
        body, _ = sass.instructions(listing(*loop[:count]), "k")
        assert body[0].sets == (0, 1) and sass.timing(body).cycles == cycles


def test_a_poll_that_comes_first_counts():
    """Another batch that is asked for only when the one before it has come."""
    loop = (
        ".L_x_1",
        ("LDG.E.64.STRONG.GPU", "R2, [R4]", 1, 0, ()),
        ("ISETP.NE", "P0, R2, R3", 5, 7, (0,)),
        ("@P0 BRA", "`(.L_x_1)", 5, 7, ()),
    )
    again = (".L_x_3", *loop[1:3], ("@P0 BRA", "`(.L_x_3)", 5, 7, ()))
    body, _ = sass.time_loop(*sass.instructions(listing(TIME_LOOP[0], *loop, *again, *TIME_LOOP[8:]), "k"))
    assert sum(".STRONG.GPU" in one.op and one.op.startswith("LD") for one in body) == 2


def test_more_products_make_another_loop_the_time_loop():
    prologue = (
        ".L_x_9",
        ("FFMA", "R0, R0, R0, R0", 4, 7, ()),
        ("BAR.SYNC", "0x0", 1, 7, ()),
        ("BRA", "`(.L_x_9)", 5, 7, ()),
    )
    many = (*TIME_LOOP[:9], *[("HMMA.16816.F32", "R0, R0, R0, R0", 4, 7, ())] * 8, *TIME_LOOP[9:])
    body, _ = sass.time_loop(*sass.instructions(listing(*prologue, *many), "k"))
    assert sass.products(body) == 9
