"""What is read from machine code, on a listing written by hand: nvdisasm itself is not needed."""

import pytest
from cuda_on_cpu import sass


def listing(*rows):
    """nvdisasm's text of one kernel. A row: a label; or an operation, its operands, the cycles until the next may issue,
    the scoreboard that it sets or 7, the scoreboards that it waits for."""
    lines, place = ["\t.section\t.text.k", ".text.k:"], 0
    for row in rows:
        if isinstance(row, str):
            lines.append(f"{row}:")
            continue
        op, operands, stall, sets, waits = row
        control = (stall | sets << 5 | 7 << 8 | sum(1 << k for k in waits) << 11) << 41
        lines.append(f"        /*{place:04x}*/        {op} {operands} ;      /* 0x{place:016x} */")
        lines.append(f"                               /* 0x{control:016x} */")
        place += 16
    return "\n".join([*lines, "\t.section\t.nv.info"])


TIME_LOOP = (
    ".L_x_0",
    ("LDG.E.64.STRONG.GPU", "R2, [R4]", 1, 0, ()),
    ".L_x_1",
    ("ISETP.NE", "P0, R2, R3", 5, 7, (0,)),
    ("@P0 LDG.E.64.STRONG.GPU", "R2, [R4]", 1, 0, ()),
    ("@P0 BRA", "`(.L_x_1)", 5, 7, ()),
    ("FFMA", "R5, R2, R6, RZ", 4, 7, (0,)),
    ("MUFU.EX2", "R5, R5", 1, 1, ()),
    ("FADD", "R5, R5, 1", 4, 7, (1,)),
    ("BAR.SYNC", "0x0", 1, 7, ()),
    ("STG.E.64.STRONG.GPU", "[R8], R5", 2, 2, ()),
    ("@P1 BRA", "`(.L_x_0)", 5, 7, ()),
)


def test_instructions_with_their_timing():
    found, jumps = sass.instructions(listing(*TIME_LOOP, ("EXIT", "", 5, 7, ())), "k")
    assert [one.op for one in found][:2] == ["LDG.E.64.STRONG.GPU", "ISETP.NE"] and len(found) == 11
    assert found[0].sets == (0,) and found[1].waits == (0,) and found[1].stall == 5 and not found[1].sets
    assert jumps == [(3, 1), (9, 0)]
    body, inner = sass.time_loop(found, jumps)
    assert len(body) == 10 and inner == [(1, 4)]


@pytest.mark.parametrize("hop", [400, 1200])
def test_a_turn_takes_as_long_as_its_waits(hop):
    body, inner = sass.time_loop(*sass.instructions(listing(*TIME_LOOP), "k"))
    timing = sass.timing(body, inner, hop)
    # from the store to its being seen; the check, the jump, FFMA; MUFU's result; FADD, the barrier
    assert timing.cycles == hop + 5 + 5 + 4 + sass.LATENCY["MUFU"] + 4 + sass.LATENCY["BAR"]
    assert timing.waits == 2


def test_another_poll_is_no_other_hop():
    once, (inner,) = sass.time_loop(*sass.instructions(listing(*TIME_LOOP), "k"))
    assert sass.timing(once, [inner], 400).cycles < sass.timing(once, [], 400).cycles


def test_more_products_make_another_loop_the_time_loop():
    prologue = (
        ".L_x_9",
        ("FFMA", "R0, R0, R0, R0", 4, 7, ()),
        ("BAR.SYNC", "0x0", 1, 7, ()),
        ("BRA", "`(.L_x_9)", 5, 7, ()),
    )
    many = (*TIME_LOOP[:6], *[("HMMA.16816.F32", "R0, R0, R0, R0", 4, 7, ())] * 8, *TIME_LOOP[6:])
    body, _ = sass.time_loop(*sass.instructions(listing(*prologue, *many), "k"))
    assert sass.products(body) == 9
