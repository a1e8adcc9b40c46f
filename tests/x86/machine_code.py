"""The instructions of a compiled kernel for processors that may not be at hand: its products are loops of the
instruction meant, with no more loads than stated, and nothing in them converts or handles numbers one by one.

machine_code.py OBJDUMP ARCHIVE dot|amx [--counts]
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

PRODUCTS = 5  # scores, inter, intra, contribution of two parts
OF_GRADIENTS = 8  # scores, dweights, dkeys_decayed, dk, and two each for dq and dv
LOADS = re.compile(r"vmov[au]p[sd]|vmovdq[au](32|64)?|vbroadcastss|vpbroadcastd|tileloadd")
LOOP = re.compile(r"add|sub|inc|dec|cmp|test|lea|mov|j[a-z]+")  # what counts and addresses
ASKING = re.compile(r"prefetcht1|imul|movslq|s[ha][lr]|and|or|neg")  # rows ahead, and their addresses


def instructions(listing: str) -> list[tuple[int, str, str]]:
    """(address, name, operands) of each."""
    found = re.findall(r"^ *([0-9a-f]+):\t(\S+) *([^#\n]*)", listing, re.M)
    return [(int(address, 16), name, operands.strip()) for address, name, operands in found]


def innermost_loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """Those that jump back and hold no other such jump."""
    at = {address: n for n, (address, _, _) in enumerate(code)}
    ends = {}
    for n, (_, name, operands) in enumerate(code):
        target = re.match(r"([0-9a-f]+) ", operands + " ") if name.startswith("j") else None
        start = at.get(int(target[1], 16)) if target else None
        if start is not None and start <= n:
            ends[n] = start
    return [code[start : end + 1] for end, start in ends.items() if not any(start <= other < end for other in ends)]


def check(
    code: list[tuple[int, str, str]], kind: str, products: int, tiles: int
) -> tuple[list[str], list[Counter[str]]]:
    """What is wrong, and how often each instruction stands in each product's loop. So many products, and of vectors so
    many with a whole tile of sums."""
    product = {"dot": "vdpbf16ps", "amx": "tdpbf16ps"}[kind]
    wrong = []
    total = Counter(name for _, name, _ in code)
    loops = [Counter(name for _, name, _ in loop) for loop in innermost_loops(code)]
    loops = [loop for loop in loops if loop[product]]
    inside = sum(loop[product] for loop in loops)
    if total[product] != inside:
        wrong.append(f"{total[product] - inside} {product} are in no innermost loop")
    if min(inside, len(loops) + (kind == "amx")) < products:  # both parts of a contribution are in one loop of tiles
        wrong.append(f"{len(loops)} loops have {inside} {product}; expected some for each of {products} products")
    for loop in loops:
        text = f"a loop of {loop[product]} {product}"
        loads = sum(n for name, n in loop.items() if LOADS.fullmatch(name))
        most = 2 * loop[product] if kind == "amx" else loop[product] + 1
        if loads > most:
            wrong.append(f"{text} has {loads} loads; expected {most} at most")
        others = {"tilezero", "tilestored"} if kind == "amx" else set()
        if loop["prefetcht1"]:
            others |= {name for name in loop if ASKING.fullmatch(name)}
        for name in loop:
            if name != product and name not in others and not LOADS.fullmatch(name) and not LOOP.fullmatch(name):
                wrong.append(f"{text} has {name}")
    if kind == "dot" and sum(loop[product] >= 16 for loop in loops) < tiles:
        wrong.append(f"fewer than {tiles} products have 16 sums in registers")
    return wrong, loops


def main(objdump: str, archive: str, kind: str, *options: str) -> int:
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", archive], check=True, capture_output=True, text=True
    ).stdout
    code = instructions(listing)
    if not code:
        print(f"{objdump} found no instructions in {archive}")
        return 1
    gradients = "_backward_" in Path(archive).name
    wrong, loops = check(code, kind, *((OF_GRADIENTS, OF_GRADIENTS) if gradients else (PRODUCTS, PRODUCTS - 1)))
    if options or wrong:
        for loop in loops:
            print(", ".join(f"{n} {name}" for name, n in loop.most_common()))
    print("\n".join(f"{Path(archive).name}: {text}" for text in wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
